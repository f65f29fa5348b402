"""Addresses of this machine, and the network interface on which ranks communicate.

``GLOO_SOCKET_IFNAME`` names that interface, or several of them (eth0,eth1); ``--interface`` sets it.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

import psutil

from cfmask.errors import UserError
from cfmask.runtime.machine import node_name

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


def interface_addresses() -> list[tuple[str, str]]:
    """(interface, address) of this machine, IPv4 before IPv6, without link-local IPv6 addresses."""
    found = [(name, entry) for name, entries in psutil.net_if_addrs().items() for entry in entries]
    return [
        (name, entry.address)
        for family in (socket.AF_INET, socket.AF_INET6)
        for name, entry in found
        if entry.family == family and not (family == socket.AF_INET6 and ip_address(entry.address).is_link_local)
    ]


def addresses_of_chosen_interfaces() -> list[str]:
    """This machine's addresses on the interfaces that ``GLOO_SOCKET_IFNAME`` names; empty if it is not set.

    Raises:
        UserError: one of these interfaces does not exist or has no address.
    """
    chosen = [name for name in os.environ.get(INTERFACE_VARIABLE, "").split(",") if name]
    addresses = interface_addresses()
    for name in chosen:
        if not any(interface == name for interface, _ in addresses):
            raise UserError(
                f"There is no network interface {name} with an address on {node_name()}; it has "
                f"{', '.join(f'{i} ({a})' for i, a in addresses)}. Check --interface, and interface in the cluster "
                "file."
            )
    return [address for name in chosen for interface, address in addresses if interface == name]


def own_hosts() -> list[str]:
    """Addresses, then names, under which other machines may reach this one; the most likely first.

    Raises:
        UserError: see ``addresses_of_chosen_interfaces``.
    """
    if chosen := addresses_of_chosen_interfaces():
        return chosen
    own = [address for _, address in interface_addresses() if not ip_address(address).is_loopback]
    names = [name for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname()) if name]
    official = [address for name in names for address in _resolve(name) if address in own]
    return list(dict.fromkeys([*official, *own, *names]))


def use_interface_of(address: str | None) -> None:
    """Let gloo use the interface that has this address, unless ``GLOO_SOCKET_IFNAME`` is set.

    By default gloo takes the address that the host name resolves to, which is often 127.0.1.1.
    """
    for interface, own in interface_addresses():
        if own == address and not ip_address(own).is_loopback:
            os.environ.setdefault(INTERFACE_VARIABLE, interface)
            return


def unmapped(address: str) -> str:
    """An address of a socket without its scope; an IPv4-mapped IPv6 address as IPv4."""
    parsed = ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def _resolve(name: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []
