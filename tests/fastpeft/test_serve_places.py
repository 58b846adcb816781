"""Connections of fastpeft serve: how many the limit of open files has room for, and who counts as one client."""

from __future__ import annotations

import resource

import pytest
from fastpeft.apps.serve import connections
from fastpeft.apps.serve.limits import ConnectionLimits
from fastpeft.apps.training.errors import UserError


def test_connections_leave_room_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    used = 20
    monkeypatch.setattr(connections.os, "listdir", lambda path: ["x"] * used)
    for files, most in ((1024, 729), (1 << 20, 1024), (resource.RLIM_INFINITY, 1024), (80, 21)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda which, files=files: (files, files))
        found, at_once = connections.places(ConnectionLimits())
        assert found == most
        assert files == resource.RLIM_INFINITY or found + 4 * at_once <= files - used - connections._FILES
    assert connections.places(ConnectionLimits(max_connections=5))[0] == 5
    for limits, files in ((ConnectionLimits(), 50), (ConnectionLimits(max_connections=100), 100)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda which, files=files: (files, files))
        with pytest.raises(UserError, match="open files are too few"):
            connections.places(limits)


def test_an_ipv6_client_is_its_network() -> None:
    assert connections._network("2001:db8:1:2:3:4:5:6") == connections._network("2001:db8:1:2::9")
    assert connections._network("2001:db8:1:3::9") != connections._network("2001:db8:1:2::9")
    assert connections._network("fe80::1%eth0") == "fe80::/64"
    assert [connections._network(host) for host in ("10.0.0.1", "")] == ["10.0.0.1", ""]
