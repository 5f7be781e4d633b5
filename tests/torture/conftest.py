"""The server and the artefacts of the tests of serving."""

from tests.serve.conftest import tiny_artefacts as tiny_artefacts
from tests.serve.conftest import triton_server as triton_server
