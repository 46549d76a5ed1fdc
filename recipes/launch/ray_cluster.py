"""Train on the nodes of a Ray cluster, one torchrun per node, which starts a process per GPU:

    ray job submit --working-dir . -- python recipes/launch/ray_cluster.py recipe.yaml

Copy it and edit the two numbers. Recipe, data, model and runs/ must be in a folder that all nodes
share. Ray places the nodes, torchrun does the rest."""

import subprocess
import sys

NODES = 2
GPUS = 8  # of each node


def build_command(rank: int, address: str, recipe: str) -> list[str]:
    """Return the command of one node; `address` is that of the first."""
    return [
        *("torchrun", "--nnodes", str(NODES), "--nproc-per-node", str(GPUS)),
        *("--node-rank", str(rank), "--master-addr", address, "--master-port", "29500"),
        *("-m", "tunesmith", "train", recipe),
    ]


def main() -> None:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    recipe = sys.argv[1] if len(sys.argv) > 1 else "recipe.yaml"
    ray.init()
    group = placement_group([{"GPU": GPUS, "CPU": GPUS}] * NODES, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    bundles = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(NODES)]
    get_address = ray.remote(num_cpus=0)(ray.util.get_node_ip_address)
    address = ray.get(get_address.options(scheduling_strategy=bundles[0]).remote())
    launch = ray.remote(num_gpus=GPUS, num_cpus=GPUS, max_retries=0)(subprocess.run)
    tasks = [
        launch.options(scheduling_strategy=bundle).remote(
            build_command(rank, address, recipe), check=True
        )
        for rank, bundle in enumerate(bundles)
    ]
    ray.get(tasks)


if __name__ == "__main__":
    main()
