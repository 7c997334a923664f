"""Deploy to SaladCloud: scripts/deploy saladcloud create|update|status|wait|delete [--dry-run] ...

The description is deploy/saladcloud/container-group.json, or the file given with --file. Its GPU classes are names,
which are looked up; --image gives its image. If it has a queue_connection, the job queue is created. The API key
comes from SALAD_API_KEY.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from deploy.saladcloud.api import DeployError, Json, SaladCloud

DEFAULT_FILE = Path(__file__).resolve().parent / "container-group.json"
DEFAULT_URL = "https://api.salad.com/api/public"
# What PATCH takes; the rest of a container group is fixed when it is created.
PATCHABLE = (
    "container",
    "country_codes",
    "display_name",
    "liveness_probe",
    "queue_autoscaler",
    "readiness_probe",
    "replicas",
    "startup_probe",
)


def resolve_gpus(group: Json, known: dict[str, str]) -> None:
    """Replace the names of GPU classes by their identifiers.

    Raises:
        DeployError: none of the names is known.
    """
    names: list[str] = group["container"]["resources"]["gpu_classes"]
    unknown = [name for name in names if name.lower() not in known]
    if len(unknown) == len(names):
        raise DeployError(f"SaladCloud offers none of these GPU classes: {', '.join(names)}.")
    if unknown:
        print(f"Left out, because SaladCloud does not offer them: {', '.join(unknown)}.", file=sys.stderr)
    group["container"]["resources"]["gpu_classes"] = [known[name.lower()] for name in names if name.lower() in known]


def read_group(path: Path) -> Json:
    """The container group that the file describes.

    Raises:
        DeployError: the file cannot be used.
    """
    try:
        group: Json = json.loads(path.read_text())
        group["name"], group["container"]["resources"]
    except OSError as error:
        raise DeployError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DeployError(f"{path} does not describe a container group: {error}.") from error
    return group


def patch_of(group: Json) -> Json:
    """The part of the group that PATCH may change, without the replicas if an autoscaler sets them."""
    patch = {name: group[name] for name in PATCHABLE if name in group}
    if "networking" in group:
        patch["networking"] = {"port": group["networking"]["port"]}
    if "queue_autoscaler" in group:
        patch.pop("replicas", None)
    return patch


def progress(group: Json, instances: list[Json]) -> str:
    """One line on how far the group is."""
    counts: dict[str, int] = {}
    for instance in instances:
        counts[instance["state"]] = counts.get(instance["state"], 0) + 1
    pulling = [instance["pulling_progress"] for instance in instances if instance["state"] == "downloading"
               and "pulling_progress" in instance]  # fmt: skip
    parts = [f"{count} {state}" for state, count in counts.items()]
    if pulling:
        parts.append(f"image {min(pulling):.0f} % pulled")
    line = f"{group['current_state']['status']}, {ready(instances)} of {group['replicas']} ready"
    return f"{line} ({', '.join(parts)})" if parts else line


def ready(instances: list[Json]) -> int:
    """How many instances take requests."""
    return sum(bool(instance.get("ready")) for instance in instances)


def status(cloud: SaladCloud, name: str) -> None:
    """Print the group, its instances and its address."""
    group, instances = cloud.group(name), cloud.instances(name)
    print(progress(group, instances))
    for instance in instances:
        print(f"  {instance['machine_id']}  {instance['state']}{'  ready' if instance.get('ready') else ''}")
    if group.get("networking", {}).get("dns"):
        print(f"https://{group['networking']['dns']}")


def wait(cloud: SaladCloud, name: str, timeout: float) -> None:
    """Print what changes until as many instances as the group has replicas are ready.

    Raises:
        DeployError: the group stopped or failed, or the time is over.
    """
    end, last = time.monotonic() + timeout, ""
    while True:
        group, instances = cloud.group(name), cloud.instances(name)
        line = progress(group, instances)
        if line != last:
            print(time.strftime("%H:%M:%S"), line, flush=True)
            last = line
        if group["current_state"]["status"] in ("failed", "stopped"):
            reason = group["current_state"].get("description") or "no reason given"
            raise DeployError(f"The container group {name} is {group['current_state']['status']}: {reason}.")
        if ready(instances) >= group["replicas"]:
            return
        if time.monotonic() > end:
            raise DeployError(f"The container group {name} is not ready after {timeout:.0f} s: {line}.")
        time.sleep(min(5.0, timeout))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("platform", choices=["saladcloud"])
    parser.add_argument("action", choices=["create", "update", "status", "wait", "delete"])
    parser.add_argument("--organization", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--file", type=Path, default=DEFAULT_FILE, help="the description (%(default)s)")
    parser.add_argument("--image", help="the pushed image, for create and update")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that wait may take (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the requests that would change anything")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except DeployError as error:
        sys.exit(f"deploy: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks."""
    key = os.environ.get("SALAD_API_KEY", "")
    if not key and not arguments.dry_run:
        raise DeployError("Set SALAD_API_KEY to an API key of the organization.")
    url = os.environ.get("SALAD_API_URL") or DEFAULT_URL
    cloud = SaladCloud(url, key, arguments.organization, arguments.project, arguments.dry_run)
    group = read_group(arguments.file)
    name = group["name"]
    if arguments.action in ("create", "update"):
        if not arguments.image:
            raise DeployError(f"Name the pushed image with --image to {arguments.action} the container group.")
        group["container"]["image"] = arguments.image
        if key and group["container"]["resources"].get("gpu_classes"):  # a dry run without a key shows the names
            resolve_gpus(group, cloud.gpu_classes())
    if arguments.action == "create":
        if "queue_connection" in group:
            cloud.ensure_queue(group["queue_connection"]["queue_name"])
        cloud.create(group)
    elif arguments.action == "update":
        cloud.update(name, patch_of(group))
    elif arguments.action == "delete":
        cloud.delete(name)
    elif arguments.action == "status":
        status(cloud, name)
    else:
        wait(cloud, name, arguments.timeout)
    if arguments.action in ("create", "update", "delete") and not arguments.dry_run:
        print(f"SaladCloud took the request to {arguments.action} the container group {name}.")


if __name__ == "__main__":
    main()
