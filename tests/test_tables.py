from ppl_vaebm.tables import text_table


def test_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    assert text_table([["hmc", "1.5"], ["langevin", "12"]], ["kernel", "ESS"], numbers=[1]).splitlines() == [
        "kernel      ESS",
        "hmc         1.5",
        "langevin     12",
    ]


def test_cells_are_printed_as_they_are() -> None:
    assert text_table([["1e-3", "007"]]) == "1e-3  007"
