"""What chains say about their convergence, and their exchange with ArviZ."""
