"""The passes, a file each: capture, normalise, detect, plan, rewrite, report. `pipeline.py` runs them in this order."""

# In a checkout this folder is also in sight as a top-level package. Under that name every module would exist
# twice, and the classes of one copy would not be those of the other.
if __name__ != "pcr_fx.passes":
    raise ImportError("this package is called pcr_fx.passes: import pcr_fx.passes instead of passes")
