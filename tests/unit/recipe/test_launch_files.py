"""The files of recipes/launch start what this version has: each is read, or run with stand-ins for
the programs of its cluster, and the command that comes out is torchrun's and tunesmith's."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tunesmith.cli.app import VERBS
from tunesmith.core.mesh import Mesh
from tunesmith.plan.mesh import build_command

FOLDER = Path(__file__).parents[3] / "recipes" / "launch"


def parse_launch(command: list[str]) -> Any:
    """Return torchrun's options, after a look at the verb that it starts."""
    assert command[0] == "torchrun"
    options = get_args_parser().parse_args(command[1:])
    assert options.module
    assert options.training_script == "tunesmith"
    verb, recipe = options.training_script_args
    assert verb in VERBS
    assert recipe.endswith("recipe.yaml")
    return options


def run_script(script: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Run a shell script in which every program of a cluster prints, and return the command that
    torchrun got."""
    programs = folder / "bin"
    programs.mkdir()
    texts = {
        "torchrun": 'printf "%s\\n" torchrun "$@" > "$COMMAND"',
        "srun": 'shift; exec "$@"',
        "scontrol": 'printf "node-1\\nnode-2\\n"',
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o700)
    command = folder / "command"
    search_path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-c", script, "script", *arguments],
        env={"PATH": search_path, "COMMAND": str(command), **environment},
        check=True,
    )
    return command.read_text().splitlines()


def test_slurm(tmp_path: Path) -> None:
    file = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", str(file)], check=True)
    variables = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    command = run_script(file.read_text(), tmp_path, "my/recipe.yaml", **variables)
    options = parse_launch(command)
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "node-1:29500")
    assert options.training_script_args[-1] == "my/recipe.yaml"
    settings = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --ntasks-per-node=1" in settings, "torchrun starts the others"


def test_sky(tmp_path: Path) -> None:
    task: dict[str, Any] = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "setup", "run"}
    assert task["resources"]["accelerators"] == "H100:8"
    command = run_script(
        task["run"],
        tmp_path,
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NUM_GPUS_PER_NODE="8",
        SKYPILOT_NODE_RANK="1",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
    )
    options = parse_launch(command)
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert (options.node_rank, options.master_addr) == (1, "10.0.0.1")


def test_trainjob(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, job = yaml.safe_load_all((FOLDER / "trainjob.yaml").read_text())
    assert job["kind"] == "TrainJob"
    reference = {"name": runtime["metadata"]["name"], "kind": runtime["kind"]}
    assert reference.items() <= job["spec"]["runtimeRef"].items()
    trainer = job["spec"]["trainer"]
    # as Kubeflow Trainer sets them in each pod
    monkeypatch.setenv("PET_NNODES", str(trainer["numNodes"]))
    monkeypatch.setenv("PET_MASTER_ADDR", "tunesmith-node-0-0.tunesmith")
    options = parse_launch(trainer["command"])
    assert (options.nnodes, options.master_addr) == ("2", "tunesmith-node-0-0.tunesmith")
    assert int(options.nproc_per_node) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    (replicas,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicas["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_ray() -> None:
    spec = importlib.util.spec_from_file_location("ray_cluster", FOLDER / "ray_cluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = parse_launch(module.build_command(1, "10.0.0.1", "recipe.yaml"))
    assert (options.nnodes, options.nproc_per_node) == (str(module.NODES), str(module.GPUS))
    assert (options.node_rank, options.master_addr) == (1, "10.0.0.1")


@pytest.mark.parametrize("mesh", [Mesh(8), Mesh(32, 4)])
def test_the_command_of_a_plan(mesh: Mesh) -> None:
    options = parse_launch(shlex.split(build_command(mesh)))
    assert options.nproc_per_node == "8"
    assert options.standalone == (mesh.num_nodes == 1)
    assert options.nnodes == ("4" if mesh.num_nodes == 4 else "1:1")


def test_every_launch_file_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {
        *("slurm.sh", "sky.yaml", "trainjob.yaml", "ray_cluster.py")
    }
