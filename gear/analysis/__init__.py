"""Analyses of runs: each computes a table from a run's networks and keeps it in the run's folder.

The modules `alignment`, `codes`, `spatial` and `dynamics` (now `speedup`) have moved to
gear.measures. Their old import paths work until the next release.
"""

import sys

from gear.measures import alignment, codes, spatial, speedup

dynamics = speedup
MOVED = {"alignment": alignment, "codes": codes, "spatial": spatial, "dynamics": speedup}
sys.modules |= {f"gear.analysis.{name}": module for name, module in MOVED.items()}
