"""The version, for all who need it before anything else is imported."""
__version__ = "0.1.0"
NUMERIC = 3                                             # raised when the same run would give other bytes
ENGINE = f"torchcaffe {__version__} numeric {NUMERIC}"
