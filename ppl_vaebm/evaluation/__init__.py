"""The numbers by which a fitted run is judged."""
