"""The offline stage: sources -> features -> moments -> entry in the store. Alone reads raw data."""
