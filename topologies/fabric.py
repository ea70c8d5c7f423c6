"""A leaf-spine fabric (topologies/leaf_spine.py) as a Mininet topology, for Mininet's own command line:

    sudo mn --custom topologies/fabric.py --topo fabric,4,2,2 --controller remote        hosts, leaves, spines

An experiment takes its plan from a file (--plan).
"""

import sys
from pathlib import Path

# `mn --custom` executes this file by its path: neither as a module nor with the project on sys.path
_ROOT = Path(sys._getframe().f_code.co_filename).resolve().parent.parent
if str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))

from topologies.data_center import DataCenter  # noqa: E402
from topologies.leaf_spine import leaf_spine  # noqa: E402


def fabric(hosts: int = 4, leaves: int = 2, spines: int = 2) -> DataCenter:
    return DataCenter(leaf_spine(hosts, leaves, spines))


topos = {"fabric": fabric}
