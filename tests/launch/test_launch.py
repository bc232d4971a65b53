"""Tests of launch scripts, with stand-ins for commands of clouds and clusters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from hivit_jax import config as configs
from hivit_jax import main

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


LAUNCH = ROOT / "launch"


SCRIPTS = sorted(LAUNCH.glob("*.sh"))


TRAINING = ["--config", "configs/mae_base.py", "--workdir=gs://bucket/a run"]


# Arguments that a shell would change if they were not quoted
AWKWARD = ["--config.data.dir=it's $HOME", 'a "b" \\', "*", "$(false)", "\ttab", "é;&|"]


# Pieces of command lines, for the scripted answers of tests/helpers/stand_in.py
TRAIN = "-m hivit_jax.main"
QUEUE = "queued-resources describe"
TPU = "tpu-vm describe"

# Commands of tpu_vm.sh that accept no training flags
WITHOUT_TRAINING = ["create", "setup", "status", "delete"]


class Stage:
    """Directory with stand-ins for commands and a log of calls."""

    def __init__(self, directory: Path):
        self.calls_file = directory / "calls"
        self.vm = directory / "vm"
        stand_in = directory / "stand_in"
        source = (ROOT / "tests" / "helpers" / "stand_in.py").read_text()
        stand_in.write_text(f"#!{sys.executable} -IS\n{source}")
        stand_in.chmod(0o755)
        commands = directory / "bin"
        installed = self.vm / "hivit_jax" / ".venv" / "bin"
        for path in (commands, installed):
            path.mkdir(parents=True)
        for name in ("gcloud", "srun", "scontrol", "python", "python3", "pkill"):
            (commands / name).symlink_to(stand_in)
        (installed / "python").symlink_to(stand_in)
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "TMPDIR": str(directory),
            "CALLS": str(self.calls_file),
            "VM": str(self.vm),
            "TPU_PAUSE": "0",
        }

    def start(self, *command: str | Path, play=None, **environment) -> subprocess.Popen:
        """Start a command.

        Args:
          play: scripted answers, see `PLAY` in tests/helpers/stand_in.py. By default,
            pkill finds no process, and the TPU is ready.
        """
        answers = {"pkill": [["", 1]], TPU: [["READY", 0]]} | (play or {})
        variables = {"PLAY": json.dumps(answers), **self.environment, **environment}
        return subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=self.vm.parent,
        )

    def run(self, *command: str | Path, **options) -> tuple[int, str, str]:
        """Run a command to its end; return (exit code, stdout, stderr)."""
        self.calls_file.unlink(missing_ok=True)
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self) -> list[list[str]]:
        """Return name and arguments of every call since the last `run` began."""
        if not self.calls_file.exists():
            return []
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def steps(self) -> list[str]:
        """Return the verbs of gcloud calls, and "train" for training."""
        return [
            "train" if call[0] == "python" else call[4]
            for call in self.calls()
            if call[0] in ("gcloud", "python")
        ]

    def training_arguments(self) -> list[list[str]]:
        """Return the arguments of each training command."""
        return [call[3:] for call in self.calls() if call[0] == "python"]


@pytest.fixture
def stage(tmp_path):
    """Return a directory with stand-ins for commands."""
    return Stage(tmp_path)


def tpu_vm(command, *flags):
    """Return a command line of tpu_vm.sh."""
    return LAUNCH / "tpu_vm.sh", command, *flags


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("name", ["slurm.sh", "fake_pod.sh"])
def test_help_prints_the_comment_at_the_top(name):
    """The output does not contain the options for sbatch."""
    command = [LAUNCH / name, "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"  launch/{name} " in text
    assert text.rstrip().endswith("PYTHON: the interpreter; python by default.")


# TPU VMs


def gcloud(*arguments):
    """Return the arguments of a gcloud call, as logged."""
    return ["gcloud", "compute", "tpus", *arguments]


def test_create_waits_until_the_request_is_active(stage):
    waiting = {QUEUE: [["WAITING_FOR_RESOURCES", 0], ["", 1], ["ACTIVE", 0]]}
    flags = ("--name=n", "--zone", "z", "--project=p", "--type=v4-32", "--version=v")
    assert stage.run(*tpu_vm("create", *flags, "--spot"), play=waiting)[0] == 0
    location = ["--zone=z", "--project=p", "--quiet"]
    state = "--format=value(state.state)"
    assert stage.calls() == [
        gcloud(
            *("queued-resources", "create", "n", "--node-id=n"),
            *("--accelerator-type=v4-32", "--runtime-version=v", "--spot", *location),
        ),
        *[gcloud("queued-resources", "describe", "n", state, *location)] * 3,
    ]


def test_create_uses_defaults_or_environment_variables(stage):
    play = {QUEUE: [["ACTIVE", 0]]}
    assert stage.run(*tpu_vm("create"), play=play)[0] == 0
    command = gcloud("queued-resources", "create", "hivit", "--node-id=hivit")
    command += ["--accelerator-type=v5litepod-4"]
    command += ["--runtime-version=v2-alpha-tpuv5-lite"]
    assert stage.calls()[0] == [*command, "--quiet"]
    assert stage.run(*tpu_vm("create"), play=play, TPU_SPOT="1", TPU_ZONE="z")[0] == 0
    assert stage.calls()[0] == [*command, "--spot", "--zone=z", "--quiet"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_failed_create_exits_with_1(stage, state):
    assert stage.run(*tpu_vm("create"), play={QUEUE: [[state, 0]]})[0] == 1
    assert stage.run(*tpu_vm("create"), play={"create": [["", 1]]})[0] == 1


def test_setup_installs_this_checkout(stage):
    assert stage.run(*tpu_vm("setup", "--name=n"))[0] == 0
    archive = stage.vm.parent / "n.tgz"
    copy, ssh, *remote = stage.calls()
    options = ["--worker=all", "--quiet"]
    assert copy == gcloud("tpu-vm", "scp", str(archive), "n:hivit_jax.tgz", *options)
    assert ssh[:6] == gcloud("tpu-vm", "ssh", "n")
    assert [ssh[6], ssh[8]] == options
    assert remote == [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        [
            *("python3", "-m", "uv", "venv", "--quiet", "--allow-existing"),
            *("--python", "3.11", ".venv"),
        ],
        [
            *("python3", "-m", "uv", "pip", "install", "--quiet", "--python", ".venv"),
            *("--constraint", "requirements.lock", "--editable", ".[data,tpu]"),
        ],
    ]
    for name in ("hivit_jax/main.py", "configs/mae_base.py", "setup.cfg"):
        assert (stage.vm / "hivit_jax" / name).read_text() == (ROOT / name).read_text()


def test_arguments_arrive_intact(stage):
    """Training receives its arguments unchanged through both shells and gcloud."""
    assert stage.run(*tpu_vm("run", "--", *TRAINING, *AWKWARD))[0] == 0
    assert stage.steps() == ["ssh", "train"]
    assert stage.training_arguments() == [TRAINING + AWKWARD]


def test_status_prints_two_states_and_delete_is_forced(stage):
    play = {QUEUE: [["ACTIVE", 0]]}
    code, out, _ = stage.run(*tpu_vm("status"), play=play)
    assert (code, out) == (0, "ACTIVE\nREADY\n")
    assert stage.run(*tpu_vm("delete", "--name=n", "--zone=z"))[0] == 0
    assert stage.calls() == [
        gcloud("queued-resources", "delete", "n", "--force", "--zone=z", "--quiet")
    ]


@pytest.mark.parametrize("code", [0, 1, 75])
def test_run_exits_with_the_code_of_training(stage, code):
    play = {TRAIN: [["", code]]}
    assert stage.run(*tpu_vm("run", "--", *TRAINING), play=play)[0] == code


# Expected `Stage.steps` of setup, of a recreated TPU, and of a resume on a ready TPU
INSTALL = ["scp", "ssh"]
RECREATE = ["delete", "create", "describe", *INSTALL]
RESUME = ["describe", *INSTALL, "ssh", "train"]


def run_keep(stage, exit_codes, tpu_states=("READY",)):
    """Run `keep`; return (steps, exit code).

    Args:
      exit_codes: one for each training command; the last code repeats.
      tpu_states: one for each query, "" for a missing TPU; the last state repeats.
    """
    play = {
        TRAIN: [["", code] for code in exit_codes],
        TPU: [[state, 0 if state else 1] for state in tpu_states],
        QUEUE: [["ACTIVE", 0]],
    }
    code, _, error = stage.run(*tpu_vm("keep", "--spot", "--", *TRAINING), play=play)
    assert "may still exist" in error
    assert all(arguments == TRAINING for arguments in stage.training_arguments())
    return stage.steps(), code


def test_missing_or_preempted_tpu_is_recreated_and_training_resumes(stage):
    states = ["", "PREEMPTED", "PREEMPTED", "READY"]
    steps, code = run_keep(stage, [1, 0], states)
    train = ["ssh", "train"]
    assert steps == [
        "describe",
        *RECREATE,
        *train,
        "describe",
        "describe",
        *RECREATE,
        *train,
    ]
    assert code == 0


def test_unreachable_tpu_is_recreated(stage):
    """Exit code 255 of ssh means that the TPU cannot be reached."""
    steps, code = run_keep(stage, [255, 0])
    assert steps == [*RESUME, "describe", *RECREATE, "ssh", "train"]
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("ending", [75, 134, "abort"])
def test_interrupted_run_resumes_on_the_same_tpu(stage, ending):
    """Exit code 75: the state is saved; 134 or an abort: a process was lost."""
    steps, code = run_keep(stage, [ending] * 6 + [0])
    assert steps == [*RESUME, "describe"] * 6 + RESUME
    assert code == 0


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_runs_with_exit_codes_2_to_5_are_not_retried(stage, code):
    assert run_keep(stage, [code]) == (RESUME, code)


@pytest.mark.slow
def test_crashing_run_is_started_five_times(stage):
    steps, code = run_keep(stage, [139])
    assert steps.count("train") == 5
    assert code == 139


def test_resume_recreates_a_lost_tpu(stage):
    play = {TPU: [["SUSPENDED", 0]], QUEUE: [["ACTIVE", 0]]}
    assert stage.run(*tpu_vm("resume", "--", *TRAINING), play=play)[0] == 0
    assert stage.steps() == ["describe", *RECREATE, "ssh", "train"]


@pytest.mark.parametrize("command", [*WITHOUT_TRAINING, "run", "resume", "keep"])
def test_dry_run_prints_commands_to_paste(stage, command):
    play = {TPU: [["", 1]], QUEUE: [["ACTIVE", 0]]}
    training = [] if command in WITHOUT_TRAINING else ["--", *TRAINING, *AWKWARD]
    flags = ["--name=n", "--spot", "--zone=a zone"]
    code, printed, _ = stage.run(*tpu_vm(command, *flags, "--dry_run", *training))
    assert code == 0
    assert stage.calls() == []
    stage.run(*tpu_vm(command, *flags, *training), play=play)
    called = stage.calls()
    stage.run("bash", "-c", printed, play=play)
    assert stage.calls() == called
    assert called


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "launch/tpu_vm.sh COMMAND"),
        (["start"], "launch/tpu_vm.sh COMMAND"),
        (["create", "--color=red"], "--color"),
        (["create", "--name"], "--name needs a value"),
        (["create", "--", "--workdir=gs://b"], "create accepts no training flags"),
        (["run"], "run needs training flags"),
        (["keep", "--", "--workdir", "runs/mae"], "gs://BUCKET"),
        (["setup", "--source=/nowhere"], "--source=/nowhere"),
    ],
)
def test_invalid_arguments_exit_with_code_2(stage, arguments, fragment):
    code, _, error = stage.run(LAUNCH / "tpu_vm.sh", *arguments)
    assert code == 2
    assert fragment in error
    assert stage.calls() == []


# SLURM

SRUN = ["srun", "--kill-on-bad-exit=0", "--wait=150"]


JOB = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}


@pytest.mark.parametrize("code", [0, 2, 75, 134, 137])
def test_only_interrupted_jobs_are_requeued(stage, code):
    script = [LAUNCH / "slurm.sh", *TRAINING, *AWKWARD]
    assert stage.run(*script, play={"srun": [["", code]]}, **JOB)[0] == code
    step = [*SRUN, "--cpus-per-task=4", "python", "-m", "hivit_jax.main"]
    requeue = [["scontrol", "requeue", "7"]] if code in (75, 134) else []
    assert stage.calls() == [[*step, *TRAINING, *AWKWARD], *requeue]


def test_dry_run_of_a_job_prints_commands_to_paste(stage):
    script = [LAUNCH / "slurm.sh", "--dry_run", *TRAINING, *AWKWARD]
    code, printed, _ = stage.run(*script, PYTHON="my python")
    assert code == 0
    assert stage.calls() == []
    stage.run("bash", "-c", printed)
    step = [*SRUN, "my python", "-m", "hivit_jax.main", *TRAINING, *AWKWARD]
    assert stage.calls() == [step, ["scontrol", "requeue", "JOB"]]


def test_slurm_script_outside_a_job_is_an_error(stage):
    code, _, error = stage.run(LAUNCH / "slurm.sh", *TRAINING)
    assert (code, stage.calls()) == (2, [])
    assert "sbatch" in error


def test_job_options_precede_the_first_command():
    """SLURM ignores options after the first command. Each GPU has one process."""
    text = (LAUNCH / "slurm.sh").read_text()
    comments = re.match(r"(#.*\n)*", text)[0]
    assert comments.count("\n#SBATCH ") == text.count("#SBATCH ")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "TERM@120"
    assert "requeue" in options


# A pod on one machine


def fake_pod(count, *arguments):
    """Return a command line of fake_pod.sh."""
    return LAUNCH / "fake_pod.sh", "-n", count, "--", *arguments


def test_fake_pod_starts_processes_and_prefixes_their_lines(stage):
    code, out, _ = stage.run(
        *fake_pod(3, *TRAINING, *AWKWARD), play={TRAIN: [["one\ntwo", 0]]}
    )
    assert code == 0
    expected = [f"[{i}] {word}" for i in range(3) for word in ("one", "two")]
    assert sorted(out.splitlines()) == expected
    (address,) = {call[-3] for call in stage.calls()}
    assert re.fullmatch(r"--coordinator_address=localhost:[12]\d{4}", address)
    command = ["python", "-m", "hivit_jax.main", *TRAINING, *AWKWARD, address]
    assert sorted(stage.calls()) == [
        [*command, "--num_processes=3", f"--process_id={i}"] for i in range(3)
    ]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP])
def test_fake_pod_ends_its_processes_after_a_signal(stage, signal_number):
    """The pod sends SIGTERM to its processes after SIGTERM and after SIGHUP."""
    play = {TRAIN: [["waiting", "signal"]]}
    # If the tests run under nohup, SIGHUP is ignored, and the pod would inherit that.
    before = signal.signal(signal_number, signal.SIG_DFL)
    process = stage.start(*fake_pod(4, *TRAINING), play=play)
    signal.signal(signal_number, before)
    waiting = {process.stdout.readline() for _ in range(4)}
    assert waiting == {f"[{i}] waiting\n" for i in range(4)}
    process.send_signal(signal_number)
    process.communicate(timeout=30)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        *[((0, 75), 75), ((75, 3), 3), ((0, 0), 0), ((2, 75), 2)],
        *[((0, 134), 134), ((134, 4), 4), ((4, 134), 4)],
    ],
)
def test_fake_pod_exits_with_the_code_of_a_failed_process(stage, codes, expected):
    """Codes 75 and 134 are returned only if no process fails with another code."""
    play = {f"--process_id={i}": [["", code]] for i, code in enumerate(codes)}
    assert stage.run(*fake_pod(len(codes), *TRAINING), play=play)[0] == expected


def test_fake_pod_ends_when_one_process_fails(stage):
    play = {"--process_id=1": [["", 4]], TRAIN: [["", "signal"]]}
    code, _, error = stage.run(*fake_pod(3, *TRAINING), play=play, GRACE="0")
    assert code == 4
    assert "[1] exit code 4" in error
    assert {line for line in error.splitlines() if "exit code 137" in line} == {
        "[0] exit code 137",
        "[2] exit code 137",
    }


@pytest.mark.parametrize("arguments", [[], ["-n", "0", "--"], ["-n", "2", "--config"]])
def test_fake_pod_prints_its_usage_for_invalid_arguments(stage, arguments):
    code, _, error = stage.run(LAUNCH / "fake_pod.sh", *arguments)
    assert (code, stage.calls()) == (2, [])
    assert error.startswith("usage: ")


# Containers


def reaction_to(jobset, code):
    """Return "end" or "restart", the reaction of a jobset to a container's exit code.

    Evaluates Kubernetes' podFailurePolicy, then JobSet's failurePolicy. In each policy,
    the first matching rule applies.
    """
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    reason = "BackoffLimitExceeded"  # because backoffLimit is 0
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
        condition = rule["onExitCodes"]
        is_listed = code in condition["values"]
        if condition.get("containerName", container["name"]) != container["name"]:
            continue
        if code and is_listed == {"In": True, "NotIn": False}[condition["operator"]]:
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    policy = jobset["spec"].get("failurePolicy", {"maxRestarts": 0})
    for rule in policy.get("rules", []):
        reasons = rule.get("onJobFailureReasons") or [reason]
        jobs = rule.get("targetReplicatedJobs") or [replicated["name"]]
        if reason in reasons and replicated["name"] in jobs:
            assert rule["action"] in ("FailJobSet", "RestartJobSet")
            if rule["action"] == "FailJobSet":
                return "end"
            break
    return "restart" if policy["maxRestarts"] else "end"


@pytest.mark.parametrize(
    ("code", "expected"),
    [(code, "end") for code in (2, 3, 4, 5)]
    + [(code, "restart") for code in (1, 75, 134, 137, 143)],
)
def test_jobset_restarts_except_after_exit_codes_2_to_5(code, expected):
    """Preempted and crashed pods restart."""
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert reaction_to(jobset, code) == expected


def test_jobset_uses_all_chips_of_the_slice():
    """No pod restarts alone; each has 120 s to save. Training accepts the arguments."""
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] >= 100
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] == 120
    flags, overrides = main.parse(container["args"])
    assert configs.load(flags.config, overrides).task == "mae"
    assert flags.workdir.startswith("gs://")


def test_dockerfile_names_existing_files_and_extras():
    """.dockerignore does not exclude the files that the Dockerfile copies."""
    text = (LAUNCH / "Dockerfile").read_text()
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    allowed = (ROOT / ".dockerignore").read_text().split()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    package = ConfigParser()
    package.read(ROOT / "setup.cfg")
    assert {"cuda", "tpu", "data"} <= set(package["options.extras_require"])
    assert '".[data,$EXTRA]"' in text
