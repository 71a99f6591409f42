"""Trained runs in use: found, sampled from, scored."""

import io
import json
import shutil
import sys

import pytest
import torch
import transformers
from study_cases import run, tiny

from smollm.attention.rope import token_positions
from smollm.data.tokenizer import spellings
from smollm.model import SmolLM
from smollm.studies import commands, evaluate, export, sample
from smollm.studies.trained import open_run
from smollm.training import trainer
from smollm.training.loader import Batch

FLAGS = ["--variants", "gqa", "mga", "--document-mask", "--batch-size=3", "--val-tokens=1000"]


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """A study that has left its corpus: it was copied from where it was made."""
    made, copied = (tmp_path_factory.mktemp(name) for name in ("made", "copied"))
    assert run(FLAGS, data_dir, made) == 0
    return shutil.copytree(made, copied / "study")


@pytest.fixture
def stopped(data_dir, tmp_path, monkeypatch, ctrl_c):
    """A study interrupted in the sixth step of its one run, with a checkpoint after five."""
    with monkeypatch.context() as patched:
        rate, steps = trainer.learning_rate, []

        def learning_rate(step, config):
            steps.append(step)
            if step == 5:
                ctrl_c()
            return rate(step, config)

        patched.setattr(trainer, "learning_rate", learning_rate)
        assert commands.main(tiny(["--variants=mha"], data_dir, tmp_path)) == 130
    return tmp_path


def weights(path):
    return open_run(path, None, "cpu").model.state_dict()


@pytest.mark.parametrize("variant", ["gqa", "mga"])
def test_a_run_scores_what_it_recorded(variant, folder, capsys):
    recorded = json.loads((folder / "ablation_results.json").read_text())["runs"][variant]
    trained = open_run(folder, variant, "cpu")
    corpus = evaluate.find_corpus(trained)
    assert evaluate.score(trained, corpus) == {
        name: recorded[name] for name in ("val_loss", "perplexity", "bits_per_byte")
    }
    path = folder / f"{variant}_model.pt"
    assert commands.main(["evaluate", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path}, 6 steps, on builtin (sha256 {corpus.sha256[:12]}):\n"
        f"loss {recorded['val_loss']:.4f} nats per token\n"
        f"perplexity {recorded['perplexity']:,.2f}\n"
        f"{recorded['bits_per_byte']:.4f} bits per byte\n"
    )


def test_another_corpus_of_the_tokenizer_is_scored(folder, prepare_mine, tmp_path, capsys):
    prepare_mine(tmp_path)
    flags = ["--variant=gqa", "--corpus=mine", f"--data-dir={tmp_path}", "--val-tokens=64"]
    assert commands.main(["evaluate", str(folder), *flags]) == 0
    assert f"{folder / 'gqa_model.pt'}, 6 steps, on mine (sha256 " in capsys.readouterr().out


def test_a_changed_corpus_and_another_tokenizer_are_refused(folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "study")
    path = other / "gqa_model.pt"
    torch.save(torch.load(path, weights_only=True) | {"corpus_sha256": "0" * 64}, path)
    assert commands.main(["evaluate", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"train.py: corpus: expected the one that {path} was trained on (sha256 "
    )
    assert said.endswith("; --corpus builtin scores it on that one\n")
    assert commands.main(["evaluate", str(path), "--corpus=builtin"]) == 0
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert commands.main(["evaluate", str(path), "--corpus=builtin"]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"train.py: corpus: expected one of {path}'s tokenizer, got 'builtin' of another\n"
    )


def test_a_sample_is_what_the_model_generates(folder, capsys):
    trained = open_run(folder, "gqa", "cpu")
    ids = trained.tokenizer.encode("The module").ids
    whole = trained.model.generate(torch.tensor([ids]), 8, eos_token_id=trained.about["eos_id"])
    command = ["sample", str(folder), "--variant=gqa", "--prompt=The module", "--max-new-tokens=8"]
    assert commands.main([*command, "--temperature=0"]) == 0
    assert capsys.readouterr().out == trained.tokenizer.decode(whole[0].tolist()) + "\n"
    texts = []
    for seed in (1, 1, 2):
        assert commands.main([*command, "--top-k=50", "--top-p=0.9", f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_an_exported_run_is_transformers_own(folder, tmp_path, capsys):
    """Its loss on the run's validation is the recorded one, packed as the run packs."""
    recorded = json.loads((folder / "ablation_results.json").read_text())["runs"]["gqa"]
    out = tmp_path / "out"
    assert commands.main(["export", str(folder), "--variant=gqa", f"--to={out}"]) == 0
    where = f"{folder / 'gqa_model.pt'}, 6 steps"
    assert capsys.readouterr().out == f"{where}, as LlamaForCausalLM in {out}/\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)

    trained = open_run(folder, "gqa", "cpu")
    corpus, train = evaluate.find_corpus(trained), trained.measured_by
    windows = corpus.val.spread(train.batch_size, train.seq_len, train.val_tokens // train.seq_len)
    nats, targets = 0.0, 0
    for ids in windows:
        batch = Batch.of(ids, corpus.eos_id, document_mask=True)
        positions = token_positions(batch.ids.shape[1], batch.cu_seqlens)[None]
        labels = batch.ids.masked_fill(positions == 0, -100)
        with torch.no_grad():
            loss = model(batch.ids, position_ids=positions, labels=labels, use_cache=False).loss
        nats += float(loss) * batch.num_targets
        targets += batch.num_targets
    assert nats / targets == pytest.approx(recorded["val_loss"], abs=1e-5)

    text = "def it():  # 12345 caf\u00e9s\n\n\treturn 'That'll do' <|endoftext|>"
    ids = trained.tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == corpus.eos_id


def test_export_names_the_end_that_the_run_had(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "study")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary, added = content["model"]["vocab"], content["added_tokens"][0]
    vocabulary["<|end|>"] = vocabulary.pop("<|endoftext|>")
    added["content"] = "<|end|>"
    (other / "tokenizer.json").write_text(json.dumps(content))
    export.export(open_run(other, "gqa", "cpu"), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|end|>"


def test_export_without_transformers_says_so(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = str(folder / "gqa_model.pt")
    assert commands.main(["export", path, f"--to={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: transformers: expected it to be installed (pip install -e ")
    assert not any(tmp_path.iterdir())


def drawing(monkeypatch, tokens):
    """A generation that draws these; what it was given."""
    given = []

    def generate(model, ids, count, *, on_token, **settings):
        given.append((ids.tolist(), count, settings))
        for token in tokens:
            on_token(torch.tensor([token]))

    monkeypatch.setattr(SmolLM, "generate", generate)
    return given


def test_text_streams_by_whole_characters(folder, monkeypatch):
    trained = open_run(folder, "gqa", "cpu")
    spelled = spellings(trained.tokenizer)
    text = "a é→🙂 z"
    cut = "é".encode()[:1]
    tokens = [spelled.index(bytes([byte])) for byte in text.encode() + cut]
    given, written = drawing(monkeypatch, tokens), []
    options = sample.Sample(run=folder, max_new_tokens=40, temperature=0.5, top_k=3, top_p=0.25)
    sample.continue_prompt(trained, "It", options, written.append)
    assert [part for part in written if part] == ["It", *text, "\ufffd"]
    end = trained.about["eos_id"]
    settings = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "eos_token_id": end}
    assert given == [([trained.tokenizer.encode("It").ids], 40, settings)]


@pytest.mark.parametrize(("terminal", "prompt"), [(False, "It is\n"), (True, "")])
def test_the_prompt_may_be_standard_input(terminal, prompt, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin := io.StringIO("It is\n\n"))
    monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
    trained = open_run(folder, "mga", "cpu")
    given = drawing(monkeypatch, [trained.about["eos_id"]])
    assert commands.main(["sample", str(folder / "mga_model.pt")]) == 0
    assert capsys.readouterr().out == f"{prompt}\n"
    assert given[0][0] == [trained.tokenizer.encode(prompt).ids or [trained.about["eos_id"]]]


def test_a_sample_ends_at_ctrl_c_and_with_its_reader(folder, monkeypatch, capfd, ctrl_c):
    command = ["sample", str(folder), "--variant=gqa", "--prompt=It"]
    drawing(monkeypatch, [5])
    monkeypatch.setattr(sample, "_write", lambda text: None if text == "\n" else ctrl_c())
    assert commands.main(command) == 130
    assert capfd.readouterr().err == "train.py: interrupted\n"

    def closed(text):
        raise BrokenPipeError

    silenced = []
    monkeypatch.setattr(sample, "_write", closed)
    monkeypatch.setattr(commands.os, "dup2", lambda old, new: silenced.append(new))
    assert commands.main(command) == 0
    assert capfd.readouterr().err == "" and silenced == [sys.stdout.fileno()]


def test_a_run_without_weights_has_its_checkpoint(stopped, folder):
    saved = weights(stopped)
    (stopped / "mha_model.pt").unlink()
    trained = open_run(stopped, None, "cpu")
    assert trained.path == stopped / "mha" / "checkpoints"
    assert trained.steps == 5 and not trained.model.training
    assert all(torch.equal(value, saved[name]) for name, value in weights(stopped).items())
    assert evaluate.score(trained, evaluate.find_corpus(trained))["val_loss"] > 0
    before = set(stopped.rglob("*"))
    newest = stopped / "mha" / "checkpoints" / "step_000000005.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{newest.parent}: expected a checkpoint that is whole"):
        open_run(stopped, None, "cpu")
    assert set(stopped.rglob("*")) == before  # also what is damaged


def test_what_has_taken_more_steps_counts(stopped):
    path = stopped / "mha_model.pt"
    content = torch.load(path, weights_only=True)
    for steps, status, expected in [
        (5, "interrupted", path),
        (4, "interrupted", stopped / "mha" / "checkpoints"),
        (4, "finished", path),
    ]:
        torch.save(content | {"steps": steps, "status": status}, path)
        assert open_run(stopped, "mha", "cpu").path == expected


def test_a_variants_only_run_goes_by_its_name(folder, tmp_path):
    runs = shutil.copytree(folder, tmp_path / "study")
    for name, new in (("gqa", "gqa-seed=1"), ("mga", "mga-lr=2e-3-seed=1")):
        (runs / f"{name}_model.pt").rename(runs / f"{new}_model.pt")
    assert open_run(runs, "gqa", "cpu").path == runs / "gqa-seed=1_model.pt"
    assert open_run(runs, "mga", "cpu").path == runs / "mga-lr=2e-3-seed=1_model.pt"
    shutil.copy(runs / "gqa-seed=1_model.pt", runs / "gqa-seed=2_model.pt")
    with pytest.raises(ValueError, match="variant: expected one of gqa-seed=1, gqa-seed=2, mga-lr"):
        open_run(runs, "gqa", "cpu")
    assert open_run(runs, "gqa-seed=2", "cpu").path == runs / "gqa-seed=2_model.pt"


REFUSALS = [
    (["sample", "{0}"], "variant: expected one of gqa, mga in {0}, got none"),
    (["evaluate", "{0}", "--variant=mha"], "variant: expected one of gqa, mga in {0}, got mha"),
    (["sample", "{0}/gqa_model.pt", "--variant=mga"], "variant: expected none beside a file of"),
    (["sample", "{0}/mla_model.pt"], "run: expected weights or a study's folder, got {0}/mla_"),
    (["sample", "{0}/gqa"],
     "run: expected weights or a study's folder, with --variant where it has several runs, got {0}"
     "/gqa with none in it"),
    (["sample", "{0}/report.md"], "{0}/report.md: expected a model saved by save_model, got"),
    (["sample", "{0}", "--variant=gqa", "--top-p=2"], "top_p: expected in (0, 1], got 2.0"),
    (["sample", "{0}", "--variant=gqa", "--device=cuda"], "device: expected 'cpu' or 'auto'"),
    (["sample", "{0}", "--variant=gqa", "--prompt=It", "--max-new-tokens=3000"],
     "max_new_tokens: expected at most max_seq_len=2048 tokens with the prompt, got 3001"),
    (["sample", "{0}", "--variant=gqa", "--prompt", "It" + " is" * 2047],
     "prompt: expected fewer than max_seq_len=2048 tokens, got 2048"),
    (["evaluate", "{0}", "--variant=gqa", "--val-tokens=9"], "val_tokens: expected >= seq_len=32"),
    (["evaluate", "{0}", "--variant=gqa", "--corpus=pile"], "corpus: expected one prepared under"),
    (["export", "{0}", "--variant=gqa", "--to={0}"], "to: expected a folder that is new or"),
    (["export", "{0}", "--variant=mga", "--to={0}/out"],
     "model: expected a mechanism of transformers: MHA, GQA or MLA, got MultiHeadGeneticAttention"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "text"), REFUSALS, ids=[text[:24] for _, text in REFUSALS])
def test_what_cannot_be_used_is_refused_by_name(argv, text, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("It"))
    assert commands.main([part.format(folder) for part in argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"train.py: {text.format(folder)}") and said.out == ""


@pytest.mark.parametrize("missing", ["tokenizer", "size", "origin"])
def test_incomplete_runs_are_refused(missing, folder, tmp_path, capsys):
    path = shutil.copy(folder / "gqa_model.pt", tmp_path)
    text = f"{tmp_path}: expected the corpus's tokenizer.json beside the weights, got none"
    if missing != "tokenizer":
        content = json.loads((folder / "tokenizer.json").read_text())
        if missing == "size":
            content["model"]["vocab"]["a new token"] = 4096
            text = f"{tmp_path / 'tokenizer.json'}: expected 4096 tokens as {path} has, got 4097"
        else:
            about = torch.load(path, weights_only=True)
            del about["config"]
            torch.save(about, path)
            text = f"{path}: expected weights that a study saved, got others"
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert commands.main(["sample", str(path), "--prompt=It"]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {text}")
