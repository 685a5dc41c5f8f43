"""Random models, against eager in their own dtype with float64 as the judge: `python -m tests.fuzz --help`."""
