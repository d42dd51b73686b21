"""``ditmoe export --to upstream``: files that upstream's code loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import contents, here, on_terminal, piped, series
from conftest import make_pico
from safetensors.torch import load_file, save_file
from upstream_code import UpstreamDiT, find_model

from ditmoe_cli import open_checkpoint
from ditmoe_cli.files import staging


def test_upstream_loads_the_file_and_it_reads_back(tmp_path: Path) -> None:
    model = make_pico(attention="flash", sampler="rf")
    model.save(tmp_path / "x.safetensors")
    predicted = here("export", "x.safetensors", "--to", "upstream", "--dry-run", cwd=tmp_path)
    assert not (tmp_path / "x.upstream.pt").exists()
    outcome = here("export", "x.safetensors", "--to", "upstream", cwd=tmp_path)
    assert outcome.path == predicted.path == tmp_path / "x.safetensors"
    assert outcome.result["bytes"] == predicted.result["bytes"] == (tmp_path / "x.upstream.pt").stat().st_size
    built = UpstreamDiT(**outcome.result["upstream"]["arguments"])
    built.load_state_dict(find_model(tmp_path / "x.upstream.pt"))
    assert here("convert", "x.upstream.pt", "-o", "y.safetensors", cwd=tmp_path).code == 0
    assert (tmp_path / "y.safetensors").stat().st_size > 0
    assert (
        open_checkpoint(tmp_path / "y.safetensors").fingerprint
        == open_checkpoint(tmp_path / "x.safetensors").fingerprint
    )


def test_dry_runs_import_no_torch(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    ((outcome, heavy),) = series([("export", "x.safetensors", "--to", "upstream", "--dry-run")], tmp_path)
    assert outcome.code == 0, outcome.err
    assert not heavy


def test_equal_work_gives_equal_bytes_and_is_not_done_twice(tmp_path: Path) -> None:
    model = make_pico()
    model.save(tmp_path / "x.safetensors")
    model.save(tmp_path / "shards", shard_bytes=20_000)
    for source in ("x.safetensors", "shards"):
        assert here("export", source, "--to", "upstream", "-o", f"{source}.pt", cwd=tmp_path).code == 0
    assert (tmp_path / "x.safetensors.pt").read_bytes() == (tmp_path / "shards.pt").read_bytes()
    before = contents(tmp_path)
    again = here("export", "x.safetensors", "--to", "upstream", "-o", "shards.pt", cwd=tmp_path)
    assert again.result["up_to_date"] is True
    assert contents(tmp_path) == before
    make_pico(seed=1).save(tmp_path / "other.safetensors")
    words = ("export", "other.safetensors", "--to", "upstream", "-o", "shards.pt")
    assert "is no copy of this input" in here(*words, cwd=tmp_path).error(5)
    assert here(*words, "--force", cwd=tmp_path).code == 0


QUANTISED = ["quantize --uniform --bits 4", "quantize --uniform --format nf4", "quantize --uniform --format int8"]


@pytest.mark.parametrize("line", QUANTISED)
def test_quantised_weights_are_written_as_the_model_sees_them(tmp_path: Path, line: str) -> None:
    make_pico(hidden=64).save(tmp_path / "x.safetensors")
    assert here(*line.split(), "x.safetensors", "-o", "q.safetensors", cwd=tmp_path).code == 0
    outcome = here("export", "q.safetensors", "--to", "upstream", "-o", "q.pt", cwd=tmp_path)
    assert any("weights are dequantised, since upstream's code loads plain ones only" in n for n in outcome.notes)
    assert here("convert", "q.safetensors", "--dequantize", "-o", "plain.safetensors", cwd=tmp_path).code == 0
    checkpoint, found = open_checkpoint(tmp_path / "q.safetensors"), find_model(tmp_path / "q.pt")
    plain = load_file(tmp_path / "plain.safetensors")
    assert found.keys() == plain.keys() == checkpoint.weights.keys()
    for name, weight in checkpoint.weights.items():
        expected = weight.unpack({member: checkpoint.reader.tensor(member) for member in weight.members})
        assert torch.equal(found[name], expected)
        assert torch.equal(plain[name], expected)
    assert open_checkpoint(tmp_path / "plain.safetensors").ancestors[-1] == checkpoint.fingerprint
    UpstreamDiT(**outcome.result["upstream"]["arguments"]).load_state_dict(found)


def test_a_dtype_goes_with_dequantised_weights(tmp_path: Path) -> None:
    make_pico(hidden=64).save(tmp_path / "x.safetensors")
    assert here(*QUANTISED[0].split(), "x.safetensors", "-o", "q.safetensors", cwd=tmp_path).code == 0
    assert here("convert", "q.safetensors", "--dequantize", "--dtype", "bf16", "-o", "b", cwd=tmp_path).code == 0
    (step,) = [s for s in open_checkpoint(tmp_path / "b").provenance().history if s.command == "convert"]
    assert step.options == {"dequantize": True, "dtype": "bf16"}
    assert {info.dtype for info in open_checkpoint(tmp_path / "b").header.tensors.values()} == {"BF16"}
    assert here("export", "q.safetensors", "--to", "upstream", "--dtype", "fp32", "-o", "b.pt", cwd=tmp_path).code == 0
    assert {value.dtype for value in find_model(tmp_path / "b.pt").values()} == {torch.float32}


def test_a_position_embedding_that_is_absent_is_rebuilt_for_upstream(tmp_path: Path) -> None:
    model = make_pico()
    model.with_state(pos_embed=None).save(tmp_path / "x.safetensors")
    outcome = here("export", "x.safetensors", "--to", "upstream", "-o", "x.pt", cwd=tmp_path)
    assert any("pos_embed is rebuilt" in note for note in outcome.notes)
    assert torch.equal(find_model(tmp_path / "x.pt")["pos_embed"], model.state["pos_embed"])


def test_ghost_rows_have_no_place_upstream(tmp_path: Path) -> None:
    model = make_pico(expert_of=((0, 1, -1, 2), (0, 1, 2, 3)), widths=((64,) * 3, (64,) * 4))
    model.save(tmp_path / "x.safetensors")
    message = here("export", "x.safetensors", "--to", "upstream", cwd=tmp_path).error(3)
    assert message.endswith("prune or merge with --router slice instead")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "upstream", "-o", "y.safetensors"), "--to upstream writes FILE.pt"),
        (("--to", "upstream", "-o", "folder"), "--to upstream writes FILE.pt"),
        (("--to", "upstream", "--max-shard-size", "1MB"), "--max-shard-size has no effect on a single file"),
        (("--to", "onnx"), "--to onnx: choose"),
        ((), "Missing option '--to'"),
    ],
)
def test_names_that_do_not_fit_the_layout(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    assert said in here("export", "x.safetensors", *words, cwd=tmp_path).error(2)


def test_broken_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = make_pico()
    model.state["final_layer.linear.bias"][3] = float("nan")
    model.save(tmp_path / "x.safetensors")
    assert "'final_layer.linear.bias' holds NaN" in here(
        "export", "x.safetensors", "--to", "upstream", cwd=tmp_path
    ).error(3)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_table_tells_how_to_build_it(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    _, text = on_terminal("export", "x.safetensors", "--to", "upstream", cwd=tmp_path)
    assert "it has no model of width 32, depth 2, patch 2 and 2 heads; build it as DiT(input_size=8" in text


def test_a_pipe_goes_on_with_what_was_exported(tmp_path: Path) -> None:
    model = make_pico(sampler="rf")
    model.save_pt(tmp_path / "x.pt", "ema", num_heads=2)
    line = "ditmoe convert x.pt --heads 2 | ditmoe export --to upstream -o x-upstream.pt | ditmoe convert --dtype bf16"
    outcome = piped(line, tmp_path)
    assert [step["command"] for step in outcome.envelope["history"]] == ["convert", "export", "convert"]
    assert outcome.envelope["history"][1]["options"] == {"to": "upstream", "output": str(tmp_path / "x-upstream.pt")}
    assert outcome.path.name == "x.converted.converted-bf16.safetensors"
    found = find_model(tmp_path / "x-upstream.pt")
    assert all(torch.equal(found[name], value) for name, value in model.state.items())


def test_the_input_is_no_target(tmp_path: Path) -> None:
    make_pico().save_pt(tmp_path / "x.pt")
    words = ("export", "x.pt", "--heads", "2", "--to", "upstream", "-o", "x.pt", "--force")
    before = contents(tmp_path)
    assert "is the input itself" in here(*words, cwd=tmp_path).error(5)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------ diffusers


def test_a_folder_for_diffusers_has_the_bytes_that_a_dry_run_tells(tmp_path: Path) -> None:
    make_pico(sampler="rf").save(tmp_path / "x.safetensors")
    words = ("export", "x.safetensors", "--to", "diffusers", "--max-shard-size", "50KB")
    predicted = here(*words, "--dry-run", cwd=tmp_path)
    assert not (tmp_path / "x.diffusers").exists()
    written = here(*words, cwd=tmp_path)
    files = [file for file in (tmp_path / "x.diffusers").rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) > 1
    assert predicted.result["bytes"] == written.result["bytes"] == sum(file.stat().st_size for file in files)
    assert written.result["diffusers"]["steps"] == 50
    assert here("inspect", "x.diffusers", cwd=tmp_path).result["config"]["sampler"] == "rf"
    read = here("convert", "x.diffusers", "--from-diffusers", "-o", "y.safetensors", cwd=tmp_path)
    assert open_checkpoint(read.path).fingerprint == open_checkpoint(tmp_path / "x.safetensors").fingerprint


def test_a_folder_is_written_once_and_replaced_where_it_is_an_export(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    make_pico(seed=1).save(tmp_path / "y.safetensors")
    words = ("--to", "diffusers", "-o", "out")
    assert here("export", "x.safetensors", *words, cwd=tmp_path).code == 0
    (tmp_path / "out" / "README.md").write_text("about it")
    before = contents(tmp_path)
    assert here("export", "x.safetensors", *words, cwd=tmp_path).result["up_to_date"] is True
    assert contents(tmp_path) == before
    assert "exists already, and is no copy of this input" in here(
        "export", "y.safetensors", *words, cwd=tmp_path
    ).error(5)
    code = tmp_path / "out" / "pipeline_ditmoe.py"
    code.write_text(code.read_text() + "# changed")
    assert "its pipeline_ditmoe.py is another" in here("export", "x.safetensors", *words, cwd=tmp_path).error(5)
    assert here("export", "y.safetensors", *words, "--force", cwd=tmp_path).code == 0
    (tmp_path / "out" / "scheduler" / "mine.txt").write_text("keep it")
    refused = here("export", "x.safetensors", *words, "--force", cwd=tmp_path).error(5)
    assert "holds scheduler/mine.txt, which is no part of such an output" in refused


def test_other_folders_files_and_broken_weights_are_refused(tmp_path: Path) -> None:
    model = make_pico()
    model.save(tmp_path / "x.safetensors")
    (tmp_path / "mine").mkdir()
    words = ("export", "x.safetensors", "--to", "diffusers")
    assert "is no such folder" in here(*words, "-o", "mine", cwd=tmp_path).error(5)
    assert "--to diffusers writes a folder" in here(*words, "-o", "y.safetensors", cwd=tmp_path).error(2)
    model.state["final_layer.linear.bias"][3] = float("nan")
    model.save(tmp_path / "b.safetensors")
    before = contents(tmp_path)
    assert "'final_layer.linear.bias' holds NaN" in here(
        "export", "b.safetensors", "--to", "diffusers", cwd=tmp_path
    ).error(3)
    assert contents(tmp_path) == before


def test_weights_for_diffusers_are_cast_and_unpacked_where_asked_for(tmp_path: Path) -> None:
    make_pico(hidden=64, sampler="rf").save(tmp_path / "x.safetensors")
    here("quantize", "x.safetensors", "--uniform", "--bits", 4, "-o", "q.safetensors", cwd=tmp_path)
    kept = here("export", "q.safetensors", "--to", "diffusers", "-o", "packed", cwd=tmp_path)
    assert kept.result["diffusers"]["packed"] == {"nf4": 34}
    here("export", "q.safetensors", "--to", "diffusers", "--dequantize", "--dtype", "bf16", "-o", "plain", cwd=tmp_path)
    made = open_checkpoint(tmp_path / "plain")
    assert {info.dtype for info in made.header.tensors.values()} == {"BF16"}
    assert made.ancestors[-1] == open_checkpoint(tmp_path / "q.safetensors").fingerprint


def test_a_vae_is_copied_or_pointed_to(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    make_pico(in_channels=1).save(tmp_path / "grey.safetensors")
    vae = tmp_path / "pipeline" / "vae"
    vae.mkdir(parents=True)
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 4}')
    save_file({"decoder.weight": torch.ones(3)}, vae / "diffusion_pytorch_model.safetensors")
    words = ("export", "x.safetensors", "--to", "diffusers")

    def index(folder: str) -> dict[str, Any]:
        document = json.loads((tmp_path / folder / "model_index.json").read_text())
        return {name: document[name] for name in ("vae", "vae_repository")}

    predicted = here(*words, "--vae", "pipeline", "-o", "whole", "--dry-run", cwd=tmp_path).result["bytes"]
    whole = here(*words, "--vae", "pipeline", "-o", "whole", cwd=tmp_path)
    assert predicted == sum(f.stat().st_size for f in (tmp_path / "whole").rglob("*") if f.is_file())
    assert index("whole") == {"vae": ["diffusers", "AutoencoderKL"], "vae_repository": None}
    assert contents(tmp_path / "whole" / "vae") == contents(vae)
    assert whole.result["diffusers"]["vae"] == str(Path("pipeline") / "vae")
    assert here(*words, "--vae", "pipeline", "-o", "whole", cwd=tmp_path).result["up_to_date"] is True
    assert here(*words, "--vae", "pipeline", "-o", "whole", "--force", cwd=tmp_path).code == 0
    here(*words, "--vae", "owner/name", "-o", "pointing", cwd=tmp_path)
    assert index("pointing") == {"vae": [None, None], "vae_repository": "owner/name"}
    here(*words, "-o", "usual", cwd=tmp_path)
    assert index("usual") == {"vae": [None, None], "vae_repository": "stabilityai/sd-vae-ft-mse"}
    here("export", "grey.safetensors", "--to", "diffusers", "-o", "pixels", cwd=tmp_path)
    assert index("pixels") == {"vae": [None, None], "vae_repository": None}
    assert "no such folder" in here(*words, "--vae", "nowhere", cwd=tmp_path).error(3)
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 16}')
    assert "decodes latents of 16 channels" in here(*words, "--vae", "pipeline", cwd=tmp_path).error(3)
    grey = ("export", "grey.safetensors", "--to", "diffusers", "--vae", "pipeline")
    assert "makes pixels, which need none" in here(*grey, cwd=tmp_path).error(2)
    upstream = ("export", "x.safetensors", "--to", "upstream", "--vae", "pipeline")
    assert "--vae has no effect with --to upstream" in here(*upstream, cwd=tmp_path).error(2)


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    monkeypatch.setattr(staging, "_free_bytes", lambda _: 1000)
    before = contents(tmp_path)
    for target in ("diffusers", "upstream"):
        assert "1.0 kB free" in here("export", "x.safetensors", "--to", target, cwd=tmp_path).error(1)
    assert contents(tmp_path) == before
