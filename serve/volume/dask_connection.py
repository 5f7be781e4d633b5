"""A Dask cluster: reached, over TLS where it has that, and its tasks kept few, whatever becomes of its workers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from serve.segment.errors import ClientError
from unet.errors import UnetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from serve.segment.address import Tls

Task = TypeVar("Task")

# Tasks of a worker's thread that wait for it, so that a volume of any size takes a bounded memory.
_TASKS_AHEAD = 3
_CONNECT_TIMEOUT_S = 5
_LOOK_S = 1.0


class DaskCluster:
    """A scheduler's address, and what is said when it or its workers are gone.

    Attributes:
        address: of the scheduler.
    """

    def __init__(self, address: str, patience_s: float, tls: Tls | None = None) -> None:
        """Prepare.

        Args:
            address: as Dask writes it, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.
            patience_s: how long it may be without workers, as one that adapts their number is at first.
            tls: certificates, for a ``tls://`` address.

        Raises:
            ClientError: address and certificates do not fit each other.
        """
        self.address, self._patience_s, self._tls = address, patience_s, tls
        if address.startswith("tls://") and tls is None:
            raise ClientError(
                f"{address} is encrypted: name its authority and your certificate with --dask_tls_ca, "
                "--dask_tls_cert and --dask_tls_key"
            )
        if tls is not None and not address.startswith("tls://"):
            raise ClientError(f"--dask_tls_ca is for a scheduler at a tls:// address, and {address} is none")

    @contextlib.contextmanager
    def connected(self) -> Iterator[Any]:
        """Yields Dask's own client.

        Raises:
            ClientError: no scheduler answers, its certificate is not accepted, or Dask is not installed.
        """
        distributed = _distributed()
        security = None
        if self._tls is not None:
            self._check_certificate(self._tls)
            security = distributed.Security(
                tls_ca_file=str(self._tls.ca),
                tls_client_cert=self._tls.cert and str(self._tls.cert),
                tls_client_key=self._tls.key and str(self._tls.key),
                require_encryption=True,
            )
        try:
            client = distributed.Client(
                self.address, timeout=_CONNECT_TIMEOUT_S, set_as_default=False, security=security
            )
        except (OSError, ValueError) as error:
            raise ClientError(
                f"no Dask scheduler answers at {self.address}: start one, or name it with --dask"
            ) from error
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):  # it may be gone
                client.close(timeout=_CONNECT_TIMEOUT_S)

    def _check_certificate(self, tls: Tls) -> None:
        """Shake hands once: Dask tries again and again, and says only that time ran out."""
        host, _, port = self.address.removeprefix("tls://").rpartition(":")
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.check_hostname = False  # as Dask does: the authority vouches for the cluster's own certificates alone
        if tls.cert is not None:
            context.load_cert_chain(str(tls.cert), str(tls.key))
        try:
            with (
                socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S) as plain,
                context.wrap_socket(plain) as encrypted,
            ):
                # A server that does not accept this side's certificate says so with its first answer.
                encrypted.settimeout(_CONNECT_TIMEOUT_S)
                encrypted.recv(1)
        except ssl.SSLCertVerificationError as error:
            raise ClientError(
                f"the certificate of the Dask scheduler at {self.address} is not one of {tls.ca} "
                f"({error.verify_message}): name the authority that issued it with --dask_tls_ca"
            ) from error
        except ssl.SSLError as error:
            raise ClientError(
                f"the Dask scheduler at {self.address} does not accept this side's certificate ({error.reason}): name "
                "one of its authority with --dask_tls_cert and --dask_tls_key"
            ) from error
        except (OSError, ValueError):
            return  # not reached, or silent: what follows says so

    def stream(
        self, client: Any, tasks: Iterator[Task], submit: Callable[[Task], tuple[Any, ...]]
    ) -> Iterator[tuple[Task, Any]]:
        """Tasks with their futures, in the order in which they are finished.

        The scheduler knows a few tasks for each thread of its workers at a time, however many come and go.

        Args:
            client: Dask's own.
            tasks: taken one by one.
            submit: gives function and arguments of one.

        Raises:
            ClientError: the scheduler goes away, or has no workers for too long.
        """
        under_way: dict[Any, Task] = {}
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def fill() -> None:
            ahead = max(1, _TASKS_AHEAD * self._threads(client))
            for task in itertools.islice(tasks, max(0, ahead - len(under_way))):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that a task carries its pixels
                    future = client.submit(*submit(task), pure=False)
                under_way[future] = task
                future.add_done_callback(finished.put)

        fill()
        while under_way:
            future = self._next_finished(client, finished, fill)
            yield under_way.pop(future), future
            del future  # the scheduler forgets the task
            fill()

    def _next_finished(self, client: Any, finished: queue.SimpleQueue[Any], fill: Callable[[], None]) -> Any:
        alone_since: float | None = None
        while True:
            try:
                return finished.get(timeout=_LOOK_S)
            except queue.Empty:
                pass
            if self._threads(client):
                alone_since = None
                fill()  # workers may have come
                continue
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > self._patience_s:
                raise ClientError(f"the Dask scheduler at {self.address} has no workers: start some")

    def _threads(self, client: Any) -> int:
        if client.status != "running":
            raise self.gone()
        try:
            return sum(client.nthreads().values())
        except Exception as error:
            raise self.gone() from error

    def gone(self) -> ClientError:
        """What is said when the scheduler does not answer."""
        return ClientError(f"the Dask scheduler at {self.address} has gone: start it again")

    def result(self, future: Any, what: str) -> Any:
        """What a task found.

        Args:
            future: of a finished task.
            what: it was, for a message.

        Raises:
            UnetError: as on the worker, or a ClientError around what else the worker met, down to its own end.
        """
        from distributed.comm import CommClosedError

        if future.status == "cancelled":
            raise self.gone()
        try:
            return future.result()
        except UnetError:
            raise
        except CommClosedError as error:  # it went while it handed the result over
            raise self.gone() from error
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ClientError(f"{what} failed on the Dask cluster at {self.address}: {said}") from error


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ClientError("Dask is not installed: pip install 'unet-medical-triton[dask]'") from error
    # What it logs of lost connections the errors here say in one sentence.
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return distributed
