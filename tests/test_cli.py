"""The command line: bad input ends as one clear line and exit code 2, and leaves nothing behind."""

import io
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import make_inputs

from vit5gen import __version__
from vit5gen.cli import _read, build_parser, exit_on_bad_input, main
from vit5gen.commands.options import ConfigOptions
from vit5gen.system.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_inputs(folder)
    (folder / "broken.yaml").write_text("model: [unclosed\n")
    (folder / "twice.yaml").write_text("training:\n  num_steps: 1\ntraining:\n  seed: 1\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "scalar_section.yaml").write_text(yaml.safe_dump({"model": {"preset": "S/2"}, "training": 5}))
    (folder / "mistyped.yaml").write_text(yaml.safe_dump({"modle": {"preset": "S/2"}}))
    (folder / "unnamed_model.yaml").write_text(yaml.safe_dump({"training": {"num_steps": 1}}))
    (folder / "deep.yaml").write_text("[" * 5000)
    (folder / "laughs.yaml").write_text(
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    )
    (folder / "itself.yaml").write_text("model: &a {preset: *a}\n")
    (folder / "tagged.yaml").write_text("training: {compile: !!bool perhaps}\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "model_index.json").write_text("[" * 5000)
    (folder / "no_images" / "cat").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "broken_images" / "cat").mkdir(parents=True)
    (folder / "broken_images" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "notes").mkdir()
    (folder / "notes" / "diary.txt").write_text("dear diary")
    return folder


# What is typed (TINY, OUT: folders), and what the one line must name.
BAD = {
    "unknown command": ("smaple", ["'smaple' is not known", "autoencoder", "Did you mean 'sample'?"]),
    "option without a command": ("--seed 1", ["COMMAND"]),
    "no configuration": ("train --output OUT", ["CONFIG"]),
    "configuration is missing": ("train TINY/none.yaml --output OUT", ["none.yaml", "No such file"]),
    "configuration with a key twice": (
        "train TINY/twice.yaml --output OUT",
        ["twice.yaml", "training is given twice", "line 3"],
    ),
    "sampling option for images": (
        "evaluate TINY/broken_images --sampler sde-euler --reference TINY/broken_images",
        ["--sampler", "already contains images"],
    ),
    "configuration is no YAML": ("train TINY/broken.yaml --output OUT", ["broken.yaml", "not valid YAML"]),
    "configuration is a list": ("train TINY/list.yaml --output OUT", ["list.yaml", "list"]),
    "section is mistyped": ("train TINY/mistyped.yaml --output OUT", ["modle", "'model'"]),
    "section is missing": ("train TINY/unnamed_model.yaml --output OUT", ["model", "missing"]),
    "section is a number": (
        "train TINY/scalar_section.yaml --output OUT --training.seed 1",
        ["'training'", "num_steps", "5"],
    ),
    "key is mistyped": ("train TINY/run.yaml --output OUT --training.num_step 3", ["num_step", "num_steps"]),
    "wrong type": ("train TINY/run.yaml --output OUT --training.num_steps many", ["training.num_steps", "many"]),
    "fraction of a step": ("train TINY/run.yaml --output OUT --training.num_steps 1.5", ["num_steps", "1.5"]),
    "out of range": ("train TINY/run.yaml --output OUT --training.learning_rate -1", ["learning_rate", "-1"]),
    "probability above 1": (
        "train TINY/run.yaml --output OUT --model.class_dropout_prob 2",
        ["class_dropout_prob", "2"],
    ),
    "seed is beyond 63 bits": (f"train TINY/run.yaml --output OUT --training.seed {2**63}", ["training.seed"]),
    **{
        f"{key} = {value}": (f"train TINY/run.yaml --dry-run --{key} {value}", [key, "less than"])
        for value in (10**20,)
        for key in (
            "training.global_batch_size",
            "training.micro_batch_size",
            "vae.latent_channels",
            "vae.downsample",
            "model.hidden_size",
            "model.num_layers",
            "model.num_attention_heads",
            "model.patch_size",
            "data.resolution",
            "data.num_classes",
            "data.num_workers",
            "sampling.num_inference_steps",
            "evaluation.num_images",
            "evaluation.grid_classes",
        )
    },
    "number of 4,000 digits": (
        f"train TINY/run.yaml --dry-run --training.global_batch_size {10**4000}",
        ["training.global_batch_size", "less than"],
    ),
    "steps beyond 63 bits": (f"train TINY/run.yaml --dry-run --training.num_steps {2**63}", ["training.num_steps"]),
    "ratio is too large": ("train TINY/run.yaml --dry-run --model.mlp_ratio 1e300", ["model.mlp_ratio", "less than"]),
    "switch is too large": (
        "train TINY/run.yaml --dry-run --model.backbone_kwargs {num_registers: 1000000000000000000}",
        ["num_registers", "less than or equal"],
    ),
    "switch is beyond a float": (
        f"train TINY/run.yaml --dry-run --model.backbone_kwargs {{gamma_init: {10**400}}}",
        ["gamma_init", "valid number"],
    ),
    "option is nested too deep": (
        f"train TINY/run.yaml --dry-run --data.classes {'[' * 1000}",
        ["--data.classes", "not valid YAML"],
    ),
    "configuration is nested too deep": ("train TINY/deep.yaml --output OUT", ["deep.yaml", "not valid YAML"]),
    "configuration is a bomb": ("train TINY/laughs.yaml --output OUT", ["laughs.yaml", "aliases"]),
    "configuration holds itself": ("train TINY/itself.yaml --output OUT", ["itself.yaml", "aliases"]),
    "configuration has an odd tag": ("train TINY/tagged.yaml --output OUT", ["tagged.yaml", "perhaps"]),
    "pipeline is nested too deep": (
        "sample --checkpoint TINY/deep --num-images 1 --output OUT.png",
        ["model_index.json", "not valid JSON"],
    ),
    "sampling too many": (
        f"sample --checkpoint TINY/none --num-images {10**20} --output OUT.png",
        ["--num-images", "10000000"],
    ),
    "sampling too large a batch": (
        f"sample --checkpoint TINY/none --num-images 1 --batch-size {2**31} --output OUT.png",
        ["--batch-size", "less than"],
    ),
    "seed of samples is beyond 63 bits": (
        f"sample --checkpoint TINY/none --num-images 1 --seed {2**63} --output OUT.png",
        ["--seed", "less than"],
    ),
    "scoring too large a batch": (
        f"evaluate TINY/notes --reference TINY/notes --batch-size {2**31}",
        ["--batch-size", "less than"],
    ),
    "too many workers": (
        "classify TINY/notes --model vit5_base --checkpoint TINY/none.pth --num-workers 100000",
        ["--num-workers", "less than"],
    ),
    "output is no UTF-8": ("train TINY/run.yaml --output OUT\udce9", ["--output", "in UTF-8"]),
    "path is too long": (f"train TINY/run.yaml --output OUT --data.path {'a' * 300}", ["File name too long"]),
    "interval is reversed": (
        "train TINY/run.yaml --output OUT --sampling.guidance_interval [0.9,0.1]",
        ["guidance_interval", "[0.9, 0.1]", "start"],
    ),
    "interval of no guidance": (
        "sample --checkpoint TINY/none --num-images 1 --seed 0 --output OUT.png --guidance-interval [0.1,0.9]",
        ["guidance_interval", "no effect", "guidance_scale = 1"],
    ),
    "channels of no guidance": (
        "sample --checkpoint TINY/none --num-images 1 --seed 0 --output OUT.png --guidance-channels 3",
        ["guidance_channels", "no effect", "guidance_scale = 1"],
    ),
    "a run without its benchmark": (
        "benchmark --only start-up --run TINY/none --output OUT.json",
        ["--run", "no effect", "--only start-up"],
    ),
    "encoding trains nothing": (
        "encode TINY/run.yaml --output OUT --training.seed 3",
        ["encode", "--training.seed", "no effect"],
    ),
    "encoding reads no latents": (
        "encode TINY/run.yaml --output OUT --data.latents OUT",
        ["--data.latents", "no effect"],
    ),
    "metric has no such option": (
        "evaluate TINY/notes --reference TINY/notes --metrics {pr: {n: 5}}",
        ["--metrics pr", "'n'", "k, adm_fp16"],
    ),
    "metric is a number": (
        "evaluate TINY/notes --reference TINY/notes --metrics 5",
        ["--metrics = 5", "expected NAME"],
    ),
    "options are a number": (
        "evaluate TINY/notes --reference TINY/notes --extractor {inception: 5}",
        ["--extractor", "NAME: {option: value}"],
    ),
    "extractor has no options": (
        "train TINY/run.yaml --output OUT --evaluation.extractor {effnet-lite0: {size: 3}}",
        ["evaluation.extractor", "'size'", "it has none"],
    ),
    "MLP has no width": ("train TINY/run.yaml --output OUT --model.mlp_ratio 1e-4", ["mlp_ratio", "0.0001"]),
    "month is the 13th": ("train TINY/run.yaml --output OUT --training.seed 2024-13-45", ["training.seed", "YAML"]),
    "guidance without a null label": (
        "train TINY/run.yaml --output OUT --model.class_dropout_prob 0 --sampling.guidance_scale 2",
        ["guidance_scale = 2", "class_dropout_prob"],
    ),
    "unknown choice": ("train TINY/run.yaml --output OUT --flow.path linaer", ["flow.path", "linear"]),
    "unknown backbone": ("train TINY/run.yaml --output OUT --model.backbone vitt5", ["vitt5", "'vit5'"]),
    "unknown switch": (
        "train TINY/run.yaml --output OUT --model.backbone_kwargs {gama_init: 1}",
        ["gama_init", "gamma_init"],
    ),
    "switch is no number": (
        "train TINY/run.yaml --output OUT --model.backbone_kwargs {gamma_init: low}",
        ["gamma_init", "'low'", "a valid number"],
    ),
    "switch is no finite number": (
        "train TINY/run.yaml --output OUT --model.backbone_kwargs {gamma_init: .nan}",
        ["gamma_init", "nan", "finite"],
    ),
    "heads do not divide": ("train TINY/run.yaml --output OUT --model.num_attention_heads 5", ["5", "32"]),
    "batch does not divide": ("train TINY/run.yaml --output OUT --training.micro_batch_size 3", ["3", "4"]),
    "resolution does not divide": ("train TINY/run.yaml --output OUT --data.resolution 17", ["resolution", "17"]),
    "data folder is missing": ("train TINY/run.yaml --output OUT --data.path TINY/none", ["none", "data.path"]),
    "data folder has no images": ("train TINY/run.yaml --output OUT --data.path TINY/no_images", ["no images"]),
    "data folder has no classes": ("train TINY/run.yaml --output OUT --data.path TINY/empty", ["class"]),
    "image is broken": (
        "train TINY/run.yaml --output OUT --data.path TINY/broken_images --data.num_classes 1",
        ["0.png", "decode"],
    ),
    "class does not exist": ("train TINY/run.yaml --output OUT --data.classes [circl]", ["circl", "'circle'"]),
    "class count differs": ("train TINY/run.yaml --output OUT --data.num_classes 5", ["num_classes", "5", "3"]),
    "autoencoder is missing": ("train TINY/run.yaml --output OUT --vae.name TINY/novae", ["novae"]),
    "latents are missing": ("train TINY/run.yaml --output OUT --data.latents TINY/nolatents", ["nolatents"]),
    "sampler is unknown": ("train TINY/run.yaml --output OUT --sampling.sampler ode-hune", ["ode-hune", "ode-heun"]),
    "extractor is unknown": ("train TINY/run.yaml --output OUT --evaluation.extractor resnet", ["resnet"]),
    "output holds other files": ("train TINY/run.yaml --output TINY/notes", ["notes", "not a run"]),
    "checkpoint to resume is none": (
        "train TINY/run.yaml --output OUT --resume TINY/notes",
        ["notes", "checksums.json"],
    ),
    "checkpoint is no folder": ("sample --checkpoint TINY/none --num-images 1 --output OUT.png", ["none"]),
    "checkpoint folder is none": ("sample --checkpoint TINY/notes --num-images 1 --output OUT.png", ["notes"]),
    "no count": ("sample --checkpoint TINY/notes --output OUT.png", ["--num-images"]),
    "count is no number": ("sample --checkpoint TINY/notes --num-images few --output OUT.png", ["few", "--num-images"]),
    "samples are missing": (
        "evaluate TINY/none.npz --reference TINY/notes --output OUT.json --extractor effnet-lite0",
        ["none.npz"],
    ),
    "no reference": ("evaluate TINY/notes --output OUT.json", ["--reference"]),
    "seed is negative": (
        "evaluate TINY/broken_images --seed 0 -1 --reference TINY/broken_images",
        ["--seed = -1", "equal to 0"],
    ),
    "card of statistics": (
        "evaluate TINY/broken_images --save-statistics OUT.npz --output OUT.json",
        ["--output", "no effect with --save-statistics"],
    ),
    "card is a folder": ("evaluate TINY/notes --reference TINY/notes --output .", [".: is a folder"]),
    "SiT file is missing": ("convert TINY/none.pt --output OUT", ["none.pt"]),
    "classifier is unknown": (
        "classify TINY/notes --model vit5_bas --checkpoint TINY/none.pth",
        ["vit5_bas", "vit5_base"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    command, named = BAD[case]
    head, brace, tail = command.partition("{")  # a mapping is one argument, as quotes make it in a shell
    words = head.split() + ([brace + tail] if brace else [])
    places = {"TINY": str(tiny), "OUT": str(tmp_path / "out")}
    arguments = []
    for word in words:
        for place, path in places.items():
            word = word.replace(place, path)
        arguments.append(word)
    before = sorted(tiny.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert len(message) < 2000
    for name in named:
        assert name in message, message
    assert sorted(tiny.rglob("*")) == before
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("words", "begins"), [([], "usage: vit5gen"), (["--version"], f"vit5gen {__version__}\n")])
def test_what_is_no_command_answers(words: list[str], begins: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    said = capsys.readouterr()
    assert said.out.startswith(begins)
    assert not said.err


def test_an_error_is_a_single_line_without_traceback(tiny: Path) -> None:
    command = [sys.executable, "train.py", str(tiny / "none.yaml"), "--output", str(tiny / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_help_is_quick_and_names_every_key() -> None:
    start = time.process_time()
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.process_time() - start < 5
    for option in ("--training.num_steps", "--model.backbone_kwargs", "--resume", "--output"):
        assert option in done.stdout
    heavy = "import sys, vit5gen.cli; vit5gen.cli.build_parser(); assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=True)


def test_bounds_themselves_take_a_moment(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    most = {
        "training.global_batch_size": 2**20,
        "training.num_steps": 2**63 - 1,
        "training.keep_every": 1,
        "model.hidden_size": 2**16,
        "model.num_layers": 100,
        "model.num_attention_heads": 2**12,
        "model.patch_size": 1,
        "model.mlp_ratio": 1000,
        "data.path": "absent",
        "data.resolution": 2**12,  # beyond that a matrix of attention has no size
        "data.num_classes": 10**7,
        "vae.latent_channels": 2**16,
        "vae.downsample": 1,
        "vae.name": "none",
    }
    options = [text for key, value in most.items() for text in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tiny / "run.yaml"), "--dry-run", *options])
    assert stopped.value.code == 0
    assert "GPU-hours" in capsys.readouterr().out


def test_a_terminal_without_accents_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    for name, stream in outputs.items():
        monkeypatch.setattr(sys, name, stream)

    def fail() -> None:
        with exit_on_bad_input():
            print("caf\u00e9 caf\udce9")
            raise UserError("caf\u00e9: no such class")

    with pytest.raises(SystemExit) as stopped:
        fail()
    assert stopped.value.code == 2
    for stream in outputs.values():
        stream.flush()
    shown = {name: stream.buffer.getvalue().decode() for name, stream in outputs.items()}
    assert shown == {"stdout": "caf\\xe9 caf\\udce9\n", "stderr": "error: caf\\xe9: no such class\n"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.png"), "x.png: No such file or directory"),
        (OSError(28, "No space left on device"), "this machine: No space left on device"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input():
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_ctrl_c_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vit5gen.lab.benchmark.command.run_benchmarks", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--output", "r.json"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("module", "name"), [("study", "study"), ("data.autoencoder", "autoencoder")])
def test_old_spelling_names_the_new_command(module: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"vit5gen.{module}", run_name="__main__", alter_sys=True)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1
    assert f"`vit5gen {name} CONFIG --output FOLDER`" in error


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("auto", "auto")])
def test_a_switch_that_may_also_be_auto_is_read(text: str, value: object) -> None:
    args = build_parser().parse_args(["train", "quickstart", "--dry-run", "--training.compile", text])
    options = _read(args)
    assert isinstance(options, ConfigOptions)
    assert options.load().training.compile == value
