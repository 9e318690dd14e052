"""Ranks that mpiexec starts, over MPI: what holds over shared memory holds here."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("headrace._native", reason="the native module is not built", exc_type=ImportError)
pytest.importorskip("mpi4py", reason="mpi4py is not installed")

from rank_cases import CASES

MPIEXEC = Path(sys.executable).parent / "mpiexec"
SCRIPT = Path(__file__).parent / "mpi_ranks.py"

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason="there is no mpiexec beside this Python")


def run_with_mpi(world_size: int, *names: str) -> None:
    command = [str(MPIEXEC), "-n", str(world_size), sys.executable, str(SCRIPT), *names]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr + done.stdout
    for rank in range(world_size):
        assert f"rank {rank} of {world_size} is done" in done.stdout


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks(world_size):
    run_with_mpi(world_size, *CASES)


def test_sends_and_faults():
    run_with_mpi(2, "sends_leave_while_their_rank_is_elsewhere", "sizes_must_agree", "abort_ends_a_wait")


def test_without_mpi4py_the_reason_is_given():
    program = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from headrace.errors import BackendUnavailable\n"
        "from headrace.parallel.mpi import make_communicator\n"
        "try: make_communicator()\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.startswith("ranks of mpiexec and srun need mpi4py and an MPI library (pip install mpi4py mpich): ")
