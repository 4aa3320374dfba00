import subprocess
import sys

import pytest
from hosts import PROJECT, clean_environment

LOADED = """
import sys
{before}
import cachix_session
print(*(name for name in ("chardet", "charset_normalizer") if name in sys.modules))
"""
KNOWN = "sys.modules['chardet'] = known = type(sys)('chardet'); known.__version__ = '5.1.0'"
PIECES = "import cachix_switch as s; [*map(__import__, s.PIECES + s.FOR_REQUESTS)]"


@pytest.mark.parametrize(
    ("before", "loaded"),
    [("", ""), (PIECES, ""), (KNOWN, "chardet"), ("import requests", "charset_normalizer")],
    ids=["nothing", "a-switch-process", "a-guesser", "requests"],
)
def test_requests_loads_no_guesser_and_warns_of_nothing(tmp_path, before, loaded):
    argv = [sys.executable, "-W", "error", "-c", LOADED.format(before=before)]
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == loaded


def test_a_text_without_an_encoding_is_read_all_the_same(tmp_path):
    code = (
        "import cachix_session; answer = cachix_session.requests.Response();"
        "answer._content = b'caf\\xc3\\xa9'; print(ascii(answer.text))"
    )
    argv = [sys.executable, "-c", code]
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("'caf\\xe9'\n", "")
