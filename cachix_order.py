"""Orders: sent to the workspace until it answers, signed if a key is given."""

from __future__ import annotations

import time
from typing import Any, Optional

from activate.text import clean
from activate.values import dataclass, replace
from cachix_connection import Answer, Peer, http
from cachix_console import tell
from cachix_diagnosis import sentence
from cachix_follow import PATIENCE, ROLL_BACK, Target, decode_answer, no_workspace, rejection
from cachix_options import HOSTED
from cachix_protocol import (
    Error,
    Spec,
    Undecodable,
    Unreachable,
    UsageError,
    checked_field,
    dumps,
    uuid_field,
)
from cachix_rollout import Fact
from cachix_spec import ActivateOptions

ORDER_PATIENCE = 10.0  # seconds without any answer to the order, as --host may be wrong
THAW_SECONDS, MOST_THAW_SECONDS = 2.0, 30.0  # between two orders, as long as they are refused
LOCKED = 423  # the HTTP status of an order to a workspace that is frozen


@dataclass(frozen=True)
class Batch:
    """The deployments that an order has made. Without a run the workspace is none of ours."""

    deployments: list[Target]
    run: Optional[int] = None
    run_url: str = ""


def complete(spec: Spec, host: str, options: ActivateOptions, run: Optional[int]) -> Spec:
    """Say who deploys, and sign all deployments, if the workspace has a place for that."""
    if host == HOSTED:
        if options.signer is not None:
            tell(f"warning: {host} has no place for signatures: nothing is signed")
        return spec
    spec = replace(spec, source=options.source, run=run)
    if options.signer is None:
        return spec
    signer, scripts = options.signer, spec.rollback_scripts
    signatures = signer.sign_all(host, spec.agents, scripts, spec.wishes)
    return replace(spec, signatures=signatures)


class Frozen(Error):
    """The workspace takes no orders at present. The message is its own."""


def post_order(peer: Peer, path: str, spec: Spec, deadline: float) -> Answer:
    """Send the order until it is answered. Raises Unreachable, or Frozen.

    To repeat it does no harm, as it names the state that the agents are to reach.
    """
    return ask(peer, "POST", path, deadline, spec.to_json())


def ask(peer: Peer, method: str, path: str, deadline: float, body: Any = None) -> Answer:
    """Make a request until it is answered. Raises Unreachable, or Frozen."""
    sent = False
    more: dict[str, Any] = {}
    if body is not None:
        headers = {"Content-Type": "application/json;charset=utf-8"}
        more = {"data": dumps(body).encode(), "headers": headers}
    start, pause = time.monotonic(), 1.0
    while True:
        try:
            answer = http(peer, method, path, **more)
            if answer.status == LOCKED:
                raise Frozen(sentence(answer.body) or f"{peer.host} is frozen (HTTP {LOCKED})")
            refusal = rejection(peer, answer)
            if not isinstance(refusal, Unreachable):
                return answer
            problem = refusal
        except Unreachable as error:
            problem = error
        pause, sent = max(pause, problem.retry_after), sent or problem.sent
        patience = PATIENCE if problem.overloaded else ORDER_PATIENCE
        if time.monotonic() + pause > min(start + patience, deadline):
            hint = f"; {maybe_started(peer)}" if sent and method == "POST" else ""
            raise Unreachable(f"{problem}{hint}")
        tell(f"{problem}; trying again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def maybe_started(peer: Peer) -> str:
    """The hint for an order whose answer did not come."""
    place = "https://app.cachix.org" if peer.host == HOSTED else peer.host
    return f"the deployments may have been started: look at {place}"


def order(peer: Peer, spec: Spec, deadline: float) -> Batch:
    """Order the deployments. Raises Error.

    Their ids are empty if the workspace only knows v1 of the API.
    """
    if spec.has_wishes:  # a workspace that does not know them must not ignore them
        answer = post_order(peer, "/api/v3/deploy/activate", spec, deadline)
        if answer.status == 404:
            raise UsageError(no_wishes(peer.host))
    else:
        answer = post_order(peer, "/api/v2/deploy/activate", spec, deadline)
    if answer.status == 404 and spec.run is None:
        answer = post_order(peer, "/api/v1/deploy/activate", spec, deadline)
    if answer.status == 404 and spec.run is None:
        raise Unreachable(f"{peer.host} is not a workspace: it has no deploy API (HTTP 404)")
    try:
        record = decode_answer(peer, answer)
        records = checked_field(record, "agents", dict)
        expires = checked_field(record, "tokenExpires", str, optional=True)
        if expires:
            tell(f"warning: the token of CI expires on {clean(expires)[:10]}")
        return Batch(
            [Target(name, *_link(records, name), path) for name, path in spec.agents.items()],
            checked_field(record, "run", int, optional=True),
            clean(checked_field(record, "runUrl", str, optional=True) or ""),
        )
    except Undecodable as problem:
        raise no_workspace(peer, problem) from None


def order_in_time(
    peer: Peer, spec: Spec, options: ActivateOptions, deadline: float, run: Optional[int] = None
) -> Batch:
    """Order as `order` does. Wait for a frozen workspace if that is wanted. Raises Error.

    Each try is signed anew: what is executed meanwhile must not be newer than the signature.
    """
    pause, last = THAW_SECONDS, ""
    while True:
        try:
            return order(peer, complete(spec, peer.host, options, run), deadline)
        except Frozen as error:
            left = deadline - time.monotonic()
            if not options.waits or left <= 0:
                raise
            if str(error) != last:
                last = str(error)
                tell(f"{last}; waiting until it takes orders again")
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, MOST_THAW_SECONDS)


def no_wishes(host: str) -> str:
    """The refusal of a deploy.json that a workspace would not deploy as it was meant."""
    remedy = "deploy without them, or to a workspace of yours that is up to date"
    return f"{host} does not know the `options` of this deploy.json: {remedy}"


def _link(records: dict[str, Any], agent: str) -> tuple[str, str]:
    """The id and the URL of a deployment."""
    record = checked_field(records, agent, (dict, str))
    if isinstance(record, str):
        return "", clean(record)
    return uuid_field(record, "id"), clean(checked_field(record, "url", str))


# --- questions to a workspace of ours -------------------------------------------------------------


def fleet(peer: Peer, deadline: float) -> Optional[dict[str, Fact]]:
    """The agents that the token is for, by name; None if the workspace can't be asked.

    Raises Error.
    """
    if peer.host == HOSTED:
        return None
    agents: dict[str, Fact] = {}
    page: Optional[int] = 1
    while page is not None:
        answer = ask(peer, "GET", f"/api/v1/agents?limit=1000&page={page}", deadline)
        if answer.status in (404, 405):
            return None
        try:
            record = decode_answer(peer, answer)
            for each in checked_field(record, "agents", list):
                agents[checked_field(each, "name", str)] = Fact.from_json(each)
            page = checked_field(record, "next", int, optional=True)
        except Undecodable as problem:
            raise no_workspace(peer, problem) from None
    return agents


def order_back(peer: Peer, batch: Batch, names: list[str], deadline: float) -> Batch:
    """Order what ran before a run on these of its agents. Raises Error."""
    path = f"/api/v1/runs/{batch.run}/roll-back"
    try:
        record = decode_answer(peer, ask(peer, "POST", path, deadline, {"agents": names}))
        number = checked_field(record, "id", int)
        place = batch.run_url.rpartition("/runs/")[0]
        return Batch(
            [_back(each, place) for each in checked_field(record, "deployments", list)],
            number,
            f"{place}/runs/{number}",
        )
    except Undecodable as problem:
        raise no_workspace(peer, problem) from None


def _back(record: Any, place: str) -> Target:
    name, index = checked_field(record, "agent", str), checked_field(record, "index", int)
    url = f"{place}/agents/{clean(name)}/deployments/{index}"
    path = clean(checked_field(record, "storePath", str))
    return Target(name, uuid_field(record, "id"), url, path, ROLL_BACK)
