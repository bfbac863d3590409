"""What a user can set. YAML files and command-line values become one frozen `RunConfig` (`schema`) and, for sweeps, a
list of points (`sweep_file`). Dtypes and codecs stay strings here; the rooms above make them. Plain Python.
"""
