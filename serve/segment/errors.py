"""The client's errors, and what it does about each fault of a request.

One root, `ClientError`; a class of its own only for what another server, or a later try, may do better.
One table, `RULES`, from gRPC's code and message to an action and a sentence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from unet.errors import UnetError


class Action(Enum):
    """What is done about a fault; the request is sent again in all cases but the last."""

    WAIT = "wait, and ask the same server again"
    REOPEN = "connect again, look at the model again, share memory again"
    SEND_PIXELS = "connect again, and send the pixels instead of sharing memory"
    LEAVE = "leave the server to the others for a while; with a single server an error"
    STOP = "an error at once"


class ClientError(UnetError):
    """A server, a model, an answer, an input or an output that cannot be used."""


class ServerError(ClientError):
    """No usable answer came from a server; the same work may succeed later, or on another one.

    Attributes:
        action: what the client does about it while a run is under way.
    """

    def __init__(self, message: str, action: Action = Action.STOP) -> None:
        super().__init__(message)
        self.action = action


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        codes: gRPC's, by name; empty for any.
        words: a pattern that the server's message must contain, whatever the case; empty for any.
        action: what is done.
        sentence: for the user; {server}, {model}, {timeout}, {reason}, {reach} and {said} are filled in.
    """

    codes: tuple[str, ...]
    words: str
    action: Action
    sentence: str


# The first that fits counts. docs/client.md shows them.
RULES = (
    Rule(
        ("DEADLINE_EXCEEDED",), "", Action.LEAVE,
        "{server} gave no answer in {timeout} s: see its log, or raise --timeout_s",
    ),
    Rule(
        ("UNAVAILABLE",), "maximum queue size", Action.WAIT,
        "{server} has too many requests waiting ({said}): try again when it is less busy",
    ),
    Rule(
        ("UNAVAILABLE",), "timeout expired", Action.WAIT,
        "requests wait longer in the queue of {server} than it allows ({said}): try again when it is less busy",
    ),
    Rule(
        ("UNAVAILABLE",), "handshake|ssl|certificate", Action.STOP,
        "{server} and this client do not accept each other's certificates ({reason}): name the authority of the "
        "server's with --tls_ca, and if it asks for one give --tls_cert and --tls_key",
    ),
    Rule(
        ("UNAVAILABLE",), "resolving|lookup", Action.REOPEN,
        "the name of {server} cannot be resolved: check it, and the network",
    ),
    Rule(
        ("UNAVAILABLE",), "protocol is restricted", Action.SEND_PIXELS,
        "{server} is open to the network, and shares no memory with clients ({said})",
    ),
    Rule(("UNAVAILABLE",), "ready state|not ready", Action.REOPEN, "{model} on {server} is not ready: see its log"),
    Rule(("UNAVAILABLE",), "", Action.REOPEN, "no server answers at {server}: {reach}"),
    Rule(
        (), "unknown model", Action.REOPEN,
        "{server} does not serve {model}: publish it, or name another --model_name",
    ),
    Rule(
        (), "unable to find (system |cuda )?shared memory region", Action.REOPEN,
        "{server} has forgotten this client's shared memory, as when perf_analyzer or a restart came between: run it "
        "again, or leave shared memory off",
    ),
    Rule(
        ("INTERNAL",), "--shm-size|shared memory pool", Action.SEND_PIXELS,
        "{server} has too little room in its /dev/shm to pass tiles on to the model: enlarge it (docker's --shm-size)",
    ),
    Rule(
        ("INTERNAL",), "memoryerror|out of memory|bad_alloc|not enough memory|cuda_error_out", Action.LEAVE,
        "{server} has too little memory for {model} ({said}): lower --batch_size, or publish smaller tile sizes",
    ),
    Rule(
        ("INTERNAL",), "not healthy", Action.LEAVE,
        "the process of {model} on {server} has died ({said}): restart the server, or run `serve/triton.py watch`",
    ),
    Rule(
        ("RESOURCE_EXHAUSTED",), "larger than max", Action.STOP,
        "a request to {server} is larger than gRPC allows ({said}): lower --batch_size",
    ),
    Rule(
        ("INTERNAL", "UNKNOWN", "ABORTED", "CANCELLED", "DATA_LOSS", "RESOURCE_EXHAUSTED"), "", Action.LEAVE,
        "{server} failed: {said}: see its log",
    ),
    Rule(
        ("UNIMPLEMENTED",), "", Action.STOP,
        "{server} speaks gRPC but is no Triton ({said}): give the port of Triton's gRPC, 8001 by default",
    ),
    # INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, UNAUTHENTICATED, FAILED_PRECONDITION, OUT_OF_RANGE
    Rule((), "", Action.STOP, "{server} refused: {said}"),
)  # fmt: skip


def rule_for(code: str, message: str) -> Rule:
    """The first row of the table that fits a gRPC code, such as "UNAVAILABLE", and a message."""
    return next(
        rule
        for rule in RULES
        if (not rule.codes or code in rule.codes) and re.search(rule.words, message, re.IGNORECASE)
    )
