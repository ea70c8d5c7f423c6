"""The seed network as a Mininet topology.

                     c1 (client)
                      |
         +------------+------------+
         |   s1  physical switch   |--- SDN controller (OpenFlow 1.3)
         +----+---------------+----+
       vmnic0 |               | vmnic0
        +-----+----+    +-----+----+     vSwitch0: port group "VM Network", uplink vmnic0
        |   esx1   |    |   esx2   |     vSwitch1: port group "vMotion", uplink vmnic1, VMkernel port vmk1
        +--+----+--+    +--+----+--+
    vmnic2 |    +----------+    | vmnic2
           |       vmnic1       |        the vMotion cable: 50.50.50.1/30 - 50.50.50.2/30
           +----- mgmt ---------+        management & storage: agents, manager, NAS

Also for Mininet's own command line, without agents and VMs:

    sudo mn --custom topologies/two_hosts.py --topo vmotion --controller none
    mininet> esx1 ping -c1 50.50.50.2
"""

import sys
from pathlib import Path

# `mn --custom` executes this file by its path: neither as a module nor with the project on sys.path
_ROOT = Path(sys._getframe().f_code.co_filename).resolve().parent.parent
if str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))

from topologies.data_center import DataCenter  # noqa: E402
from topologies.plan import DEFAULT_PLAN, Plan  # noqa: E402


class TwoHosts(DataCenter):
    """The seed network; or another plan's: --topo vmotion,my_plan.toml"""

    def build(self, plan: Plan | str | Path = DEFAULT_PLAN, fail_mode: str = "secure") -> None:
        super().build(plan, fail_mode)


topos = {"vmotion": TwoHosts}
