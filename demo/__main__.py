"""``python -m demo up`` runs the main job for real; ``python -m demo down`` removes what it made."""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import yaml

import devcluster
from demo import stack
from demo.bar import LiveLine, format_bar
from demo.stack import Store
from devcluster import Cluster, DevclusterError
from devcluster.external import external_cluster
from devcluster.paths import REPOSITORY
from devcluster.progress import say
from lora_api import AdapterStatus, LoRAFineTune, Phase

NAMESPACE = "demo"
MANIFEST = REPOSITORY / "examples" / "quickstart.yaml"
OUTPUT = REPOSITORY / ".demo"
RUN_SECONDS = 1800
EVALUATE_SECONDS = 600
SAMPLES = 2


def up() -> int:
    """The whole demo, stage by stage. Returns 0 when the run succeeded."""
    with ThreadPoolExecutor() as pool:
        # Downloads and conversions that need no cluster, while the cluster's programs are compiled.
        prepared = pool.submit(stack.prepare)
        cluster = devcluster.up()
        say(f"cluster {cluster.name} is ready (export KUBECONFIG={cluster.kubeconfig})")
        prepared.result()
    images = stack.load_images(cluster)
    say("images are on the nodes")
    store = Store(cluster)
    stack.upload_demo_data(store)
    say("the base model (SmolLM2-135M-Instruct) and the tickets are in the store")
    stack.install_operator(cluster, images)
    say("the operator runs")
    name = submit(cluster)
    say(f"applied {MANIFEST.relative_to(REPOSITORY)}; follow it yourself: kubectl get lft -n {NAMESPACE} --watch")
    run = follow(cluster, name)
    if run.status.phase != Phase.SUCCEEDED or run.status.adapter is None:
        print(cluster.kubectl("describe", "lorafinetune", name, f"--namespace={NAMESPACE}"))
        say(f"the run ended as {run.status.phase}; above is what the operator says about it")
        return 1
    say("trained and published; now asking the base model and the adapter about rows that they have not seen")
    before, after = (evaluate(store, run, adapter) for adapter in (None, run.status.adapter))
    report(store, run.status.adapter, before, after)
    return 0


def down() -> int:
    """Ends the demo's cluster; on a cluster that was not started here, removes what the demo put there."""
    cluster = external_cluster()
    if cluster is None:
        devcluster.down()
        say("the cluster is gone; its programs and images are kept in the cache for the next time")
        return 0
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=300)
    stack.uninstall_operator(cluster)
    say(f"removed the namespace {NAMESPACE} and the operator")
    return 0


def submit(cluster: Cluster) -> str:
    """Applies the example in a namespace of its own, in place of an earlier run of it. Returns its name."""
    stack.make_namespace(cluster, NAMESPACE)
    name = str(yaml.safe_load(MANIFEST.read_text())["metadata"]["name"])
    where = f"--namespace={NAMESPACE}"
    cluster.kubectl("delete", "lorafinetune", name, where, "--ignore-not-found", "--cascade=foreground", timeout=180)
    cluster.kubectl("apply", where, f"--filename={MANIFEST}")
    return name


def follow(cluster: Cluster, name: str) -> LoRAFineTune:
    """Shows the run's progress until it ends.

    Raises:
        DevclusterError: it has not ended in time.
    """
    line, deadline = LiveLine(), time.monotonic() + RUN_SECONDS
    while True:
        run = stack.fetch_run(cluster, NAMESPACE, name)
        line.show(format_bar(run.status))
        if run.status.phase in (Phase.SUCCEEDED, Phase.FAILED):
            line.end()
            return run
        if time.monotonic() > deadline:
            line.end()
            raise DevclusterError(f"the run has not ended after {RUN_SECONDS} s: kubectl describe lft {name} -n demo")
        time.sleep(1)


def evaluate(store: Store, run: LoRAFineTune, adapter: AdapterStatus | None) -> dict[str, Any]:
    """Evaluation loss and exact-match rate on the held-out rows, with ``adapter`` or of the base model alone.

    The base model is unquantized, as it is served: whoever loads the adapter gets these answers.

    Raises:
        DevclusterError: the evaluation failed; its message is in the error.
    """
    assert run.spec.dataset.eval is not None
    command = [sys.executable, "-m", "lora_trainer", "evaluate", "--json", "--model", run.spec.base_model.uri]
    command += [
        "--quantization",
        "none",
        "--data",
        run.spec.dataset.eval.uri,
        "--max-seq-length",
        str(run.spec.dataset.max_seq_length),
    ]
    if adapter is not None:
        command += ["--adapter", adapter.uri]
    environment = {**os.environ, **store.environment(), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=EVALUATE_SECONDS)
    except subprocess.TimeoutExpired:
        raise DevclusterError(f"the evaluation has not ended after {EVALUATE_SECONDS} s") from None
    if done.returncode:
        raise DevclusterError(f"the evaluation failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def report(store: Store, adapter: AdapterStatus, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Prints what came out, and fetches the report of the run."""
    page = fetch_report(store, adapter)
    print(f"\n  adapter      {adapter.uri}")
    print(f"  digest       {adapter.digest} (version {adapter.version}, {adapter.size_bytes / 1e6:.1f} MB)")
    rows = f"{after['answered']} held-out rows"
    print(f"\n  on the base model as it is served (not quantized), {rows}:")
    print(f"  eval loss    {before['evalLoss']:.4f} -> {after['evalLoss']:.4f}")
    print(f"  exact match  {before['exactRate']:.0%} -> {after['exactRate']:.0%}")
    print("\n".join(trained_lines(adapter)) + "\n")
    for old, new in list(zip(before["samples"], after["samples"], strict=True))[:SAMPLES]:
        print(f"  prompt   {old['prompt'].strip()!r}")
        print(f"  wanted   {old['expected'].strip()}")
        print(f"  before   {old['answer'].strip()!r}")
        print(f"  after    {new['answer'].strip()}\n")
    print(f"  report       {page}")


def trained_lines(adapter: AdapterStatus) -> list[str]:
    """What the run itself measured: on the quantized base that it trained on, and on the base as it is served."""
    served = adapter.served
    if served is None or not served.is_measured:
        return []
    lines = []
    for name, score in (("as trained on (NF4)", served.training), (f"as served ({served.dtype})", served.after)):
        if score.loss is not None and score.share is not None:
            lines.append(f"  {name:<21}loss {score.loss:.4f}, exactly right {score.share:.0%} (the run's own figures)")
    return lines


def fetch_report(store: Store, adapter: AdapterStatus) -> Path:
    """Downloads report.html of ``adapter``."""
    path = adapter.uri.removeprefix(f"s3://{store.cluster.bucket}/").rstrip("/") + "/report.html"
    OUTPUT.mkdir(exist_ok=True)
    page = OUTPUT / "report.html"
    page.write_bytes(bytes(obstore.get(store.open(), path).bytes()))
    return page


def main() -> int:
    """Runs one command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("command", choices=("up", "down"), help="up: run the demo. down: remove what it made.")
    command = parser.parse_args().command
    try:
        return up() if command == "up" else down()
    except DevclusterError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; `make demo` goes on, `make demo-down` cleans up", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
