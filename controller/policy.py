"""What the controller is to know of a plan: what is behind which port, and whose MAC is whose."""

from controller.guard import Place, Policy
from topologies.plan import Plan, port_name


def policy_of(plan: Plan) -> Policy:
    """Ports of switches are named after what is behind them (topologies/plan.py)."""
    places = {port_name(host.switch, host.name): Place("uplink", host.name) for host in plan.hosts}
    places |= {port_name(client.switch, client.name): Place("client", client.name) for client in plan.clients}
    for trunk in plan.trunks:
        for here, there in (trunk, trunk[::-1]):
            places[port_name(here, there)] = Place("trunk", there)
    switches = {f"{number:016x}": name for number, name in enumerate(plan.switches, start=1)}
    vms = {vm.mac: str(vm.interface.ip) for vm in plan.vms}
    clients = {client.mac: str(client.interface.ip) for client in plan.clients}
    return Policy(places, switches, vms, clients)
