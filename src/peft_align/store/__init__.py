"""What lies on disk: run directories, records written last, sweeps, and where data and models are found."""
