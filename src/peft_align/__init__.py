"""Config-driven experiment sweeps for parameter-efficient preference alignment."""

__version__ = "0.1.0"
