"""Analyses of runs: from a run's networks to a table, kept beside the run.

The measures that stood here, `alignment`, `codes`, `spatial` and `dynamics`, are in gear.measures;
their old import paths work until the next release.
"""

import sys

from gear.measures import alignment, codes, spatial, speedup

dynamics = speedup
MOVED = {"alignment": alignment, "codes": codes, "spatial": spatial, "dynamics": speedup}
sys.modules |= {f"gear.analysis.{name}": module for name, module in MOVED.items()}
