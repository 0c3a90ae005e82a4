"""The agent's pyroute2 leaves out what it does not use, and nobody can tell."""

import subprocess
import sys


def told(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_the_agent_does_without_the_network_database():
    assert told("import sys, hostagent.agent; print('pyroute2.ndb.main' in sys.modules)") == "False"


def test_whoever_asks_for_more_gets_all_of_it():
    code = "import sys, hostagent, pyroute2; pyroute2.IPRoute; print(pyroute2.NDB.__name__, pyroute2.netns.__name__)"
    assert told(code) == "NDB pyroute2.netns"


def test_pyroute2_imported_before_stays():
    assert told("import pyroute2; before = pyroute2; import hostagent, pyroute2; print(before is pyroute2)") == "True"
    assert told("import pyroute2, hostagent; print('NDB' in vars(pyroute2))") == "True"
