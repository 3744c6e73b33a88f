"""Addresses of both families: a host is a name, an IPv4 address or an IPv6 address without brackets."""

import socket


def address_of(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs there."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family_of(host: str) -> socket.AddressFamily:
    """That of a socket that is bound to the host."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
