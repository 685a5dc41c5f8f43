"""What months of use bring: interruptions at any moment, killed processes, many threads and neighbours.

`PYTHONPATH=.:tests python -m stress` runs all of it at length; tests run a small part of each.
"""
