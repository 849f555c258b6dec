"""The persistent store of class statistics: schema, open, publish, verify. Knows no torch model."""
