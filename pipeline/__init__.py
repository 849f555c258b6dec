"""The offline stage: sources -> features -> moments -> entry in the store. Only this room reads raw data."""
