"""What is modelled: data sets by name, image folders, splits, pixels and batches."""
