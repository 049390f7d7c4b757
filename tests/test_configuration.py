"""What a checkpoint's configuration tells is checked before anything is loaded, and models with code of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import dynamic_module_utils

import llmprune
import tiny
import zoo
from llmprune.checkpoint import Source
from llmprune.errors import CheckpointError, UnsupportedModelError
from llmprune.model import Resident, Streamed

CPU = torch.device("cpu")

# A model of nobody's library; `loops` and `hidden` make it one that cannot be streamed.
REMOTE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PreTrainedConfig):
    model_type = "own"
    vocab_size: int = 160
    hidden_size: int = 32
    loops: int = 1
    hidden: bool = False

class OwnBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, step):
        return x + step * self.down(torch.relu(self.up(x.cumsum(1))))

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [OwnBlock(config.hidden_size) for _ in range(3)]
        self.body = nn.Sequential(*blocks) if config.hidden else nn.ModuleList(blocks)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        x = self.embed(input_ids)
        for step in range(self.config.loops):
            for block in self.body:
                x = block(x, step + 1)
        return CausalLMOutput(logits=self.head(x))
"""


def changed(folder: Path, **fields: Any) -> Path:
    """Change fields of a checkpoint's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.save(tiny.model("llama"), tmp_path / "llama")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with code of its own, which transformers copies and imports."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(REMOTE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "dtype": "float32", "auto_map": auto_map}))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    torch.nn.init.normal_(model.embed.weight)
    model.save_pretrained(folder)
    return folder


def test_code_that_comes_with_a_model_is_not_run_unasked(own: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="runs code of its own; read it, then allow it"):
        Streamed(Source.open(own), CPU)


def test_a_model_with_code_of_its_own_is_pruned_when_allowed(own: Path, tmp_path: Path) -> None:
    report = llmprune.prune(own, tmp_path / "out", method="wanda", calibration=tiny.ids(), trust_remote_code=True)
    assert [site.name for site in report.sites[:2]] == ["body.0.up.weight", "body.0.down.weight"]
    assert report.zeros == report.site_parameters // 2 == 3 * 2 * 32 * 64 // 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for site in report.sites:
        assert int((model.get_parameter(site.name) == 0).sum()) == site.zeros


def test_a_model_without_a_list_of_blocks_tells_what_was_looked_at(own: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        Streamed(Source.open(changed(own, hidden=True)), CPU, trust_remote_code=True)
    assert "OwnForCausalLM: found no list of decoder blocks (a torch ModuleList) anywhere in it" in str(caught.value)
    assert "looked at embed (Embedding), body (Sequential), head (Linear)" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "architecture", "cause"),
    [
        ("distilbert", "DistilBertForMaskedLM", "is a 'distilbert' model, not a causal language model"),
        ("bert", "BertForMaskedLM", "is a BertForMaskedLM, not a causal language model"),
        ("bart", "BartForConditionalGeneration", "is a BartForConditionalGeneration, not a causal language model"),
        ("wav2vec2", "Wav2Vec2ForCTC", "is a 'wav2vec2' model, not a causal language model"),
        ("whisper", "WhisperForConditionalGeneration", "is a WhisperForConditionalGeneration, not a causal language"),
        ("llava", "LlavaForConditionalGeneration", "is a 'llava' model, not a causal language model"),
        ("lama", "LamaForCausalLM", "is of type 'lama', which transformers .* does not know: did you mean 'llama'?"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_name(
    model_type: str, architecture: str, cause: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=cause):
        Streamed(Source.open(tmp_path), CPU)


@pytest.mark.parametrize(
    "fields", [{"hidden_act": "strange"}, {"rope_parameters": {"rope_type": "strange"}}, {"hidden_size": "wide"}]
)
def test_a_value_that_transformers_does_not_know_is_refused(fields: dict[str, Any], llama: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"(strange|wide|hidden_size)"):
        Streamed(Source.open(changed(llama, **fields)), CPU)


def test_a_field_that_transformers_does_not_know_is_noted(llama: Path, tmp_path: Path) -> None:
    report = llmprune.prune(changed(llama, clever_trick=True), tmp_path / "out", method="magnitude")
    assert "config.json has fields that transformers does not know and ignores: clever_trick" in report.notes


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma4_text", "mllama", "recurrent_gemma"])
def test_no_field_of_a_models_own_configuration_is_taken_for_unknown(name: str, tmp_path: Path) -> None:
    host = Streamed(Source.open(tiny.save(zoo.model(name), tmp_path / "m")), CPU)
    assert not [note for note in host.notes() if "does not know" in note]


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"compression_config": {"format": "pack-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_quantized_checkpoint_is_refused(fields: dict[str, Any], llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is already quantized: prune the original checkpoint, then quantize"):
        Streamed(Source.open(changed(llama, **fields)), CPU)


def test_the_text_part_of_a_loaded_multimodal_model_is_accepted() -> None:
    assert Resident(zoo.model("llama4")).blocks[0].name == "language_model.model.layers.0"
