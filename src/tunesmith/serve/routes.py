"""Names that stand for several models, and which of them answers a request.

    table = RouteTable(routes);  route = table.find("prod", key);  route.choose_arm("user ada")

In: the settings of routes and a unit: a user, an API key, or a request. Out: the name of a model.
The same unit gets the same arm while the shares stay, on every server with the same settings, and
a share that grows only takes units from others. Left out: what the answers say about an arm
(route_judge.py), the table of HTTP paths (app.py)."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.core.types import Json
from tunesmith.serve.canary import Canary
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.route_settings import RouteSettings
from tunesmith.serve.route_state import describe_canary


def compute_position(*names: str) -> float:
    """Return a number in (0, 1) that looks random and is always the same for the same names."""
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).digest()
    return (int.from_bytes(digest[:8]) + 0.5) / 2**64


def choose_arm(route: str, shares: Mapping[str, float], unit: str) -> str:
    """Return the arm of a unit, by weighted rendezvous hashing: each arm draws a waiting time with
    its share as the rate, and the first one wins. An arm's draw depends on no other arm, so that a
    change of shares moves a unit only to an arm that has gained on its own."""
    times: dict[str, float] = {}
    for arm, share in shares.items():
        if share > 0:
            times[arm] = -math.log(compute_position(route, arm, unit)) / share
    return min(times, key=lambda arm: times[arm])


@dataclass(eq=False)
class Route:
    """A route of a running server."""

    name: str
    settings: RouteSettings
    canary: Canary | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def stable(self) -> str:
        """The first arm: the one that a canary is compared with."""
        return next(iter(self.settings.arms))

    @property
    def shares(self) -> dict[str, float]:
        """Model -> its share of the requests, in percent."""
        if self.canary is None:
            return dict(self.settings.arms)
        share = self.canary.share
        return {self.stable: 100 - share, self.canary.settings.model: share}

    def name_unit(self, user: str | None, key: ApiKey, request_id: str) -> str:
        """Return who keeps an arm: the user that the request names, else the API key."""
        if self.settings.sticky == "request":
            return f"request {request_id}"
        return f"key {key.id}" if user is None else f"user {user}"

    def choose_arm(self, unit: str) -> str:
        return choose_arm(self.name, self.shares, unit)

    def should_shadow(self, model: str, request_id: str) -> bool:
        """Return whether the shadow answers a request that `model` has answered."""
        shadow = self.settings.shadow
        if shadow is None or shadow.model == model:
            return False
        return 100 * compute_position(self.name, "shadow", request_id) < shadow.share

    def describe(self) -> Json:
        """Return the route as the admin API shows it."""
        shadow = self.settings.shadow
        return {
            "id": self.name,
            "object": "route",
            "arms": self.shares,
            "sticky": self.settings.sticky,
            "shadow": None if shadow is None else {"model": shadow.model, "share": shadow.share},
            "canary": None if self.canary is None else describe_canary(self.canary),
        }


class RouteTable:
    """All routes of a server."""

    def __init__(self, routes: Sequence[Route] = ()) -> None:
        self._routes = {route.name: route for route in routes}

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes.values())

    def get(self, name: str) -> Route | None:
        return self._routes.get(name)

    def find(self, name: str, key: ApiKey) -> Route | None:
        """Return a route that the key may use; it needs no right to use the arms by name."""
        return self.get(name) if key.can_use_model(name) else None

    def list_users(self, model: str) -> list[str]:
        """Return the names of the routes that use a model."""
        names: list[str] = []
        for route in self:
            models = {name for _, name in route.settings.list_models()}
            if model in models:
                names.append(route.name)
        return names
