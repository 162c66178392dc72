"""The table of layouts against the rules that the installed transformers has."""

import assembled_values
import conversion_facts
import pytest

from ckptdiff.checkpoint.layout_names import Names
from ckptdiff.checkpoint.layouts import assemble

FACTS = conversion_facts.facts()
ROTARY = "rows of q and k are permuted, by a number of heads that only config.json has"
EXPERTS = "experts are shared out between two modules, by numbers that only config.json has"
CONVERSIONS_LEFT_OUT = {
    "kimi_k25": ROTARY,
    "step3p5_vision": ROTARY,
    "gradium_phonon_tts": ROTARY,
    "mistral_large4": ROTARY,
    "ernie4_5_vl_moe": EXPERTS,
    "qwen4_exp_text": "parts of a table are numbered inside a word",
}
"""Models of which some conversions are not in the table, and why."""

TESTED_WHOLE = {"ViTModel", "BeitModel", "SegformerModel", "phimoe", "nemotron_h"}
"""Rules that say nothing without what stands before them: test_layouts_of_models.py takes these models themselves."""

RENAMES_LEFT_OUT = """
    BeitBackbone BeitForSemanticSegmentation CLIPTextModel CLIPVisionModel ConditionalDetrModel DetrForSegmentation
    DetrModel Dots3NoteForConditionalGeneration Dots3NoteModel Emu3Model MimiDecoderModel MimiEncoderModel MimiModel
    Molmo2TextModel MtpModel NemotronH_Omni_Reasoning_V3 Qwen2_5OmniThinkerModel RfDetrForInstanceSegmentation
    RfDetrModel Sapiens2ForImageMatting Sapiens2ForNormalEstimation Sapiens2ForPointmapEstimation
    Sapiens2ForPoseEstimation Sapiens2ForSemanticSegmentation SegformerForSemanticSegmentation SwinBackbone
    Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation Tipsv2DptForSemanticSegmentation Tipsv2TextModel
    Tipsv2VisionModel UltraVBertForMaskedLM UltrabertForMaskedLM UltrabertModel UnlimitedOcrSamVisionEncoder
    UnlimitedOcrVisionEncoder ViTMSNForImageClassification altclip axk1 axk2 bailing_hybrid cohere_asr colqwen2
    cosmos3_edge cosmos3_omni d_fine deepseek_ocr2 deepseek_v4 dinov3_convnext dinov3_vit dots3_note_audio_encoder
    dots3_note_vision_encoder emu3 ernie4_5_moe ernie4_5_vl_moe esm gemma4_unified glm5_next gradium_phonon_tts gte
    hunyuan_vl hy_v4 hyperclovax_vision_v2 inkling2 inkling2_text inkling_mm_model jev jina_embeddings_v3 kimi_k25
    kolibri1 legacy lfm3 lfm3_vl_vision minimax_m3_vl mistral_large4 mistral_large4_text molmo2 nemo_speechlm
    nomic_bert olmo_hybrid paddleocr_vl pi0 pixio pp_doclayout_v4 qianfan_ocr radio rt_detr sam3_tracker sapiens2
    step3p5_vision step3p7 t5gemma2_encoder timesfm2_5 timm_wrapper tipsv2 tipsv2_dpt unlimited_ocr videomae yolos
"""
"""Models of which some modules have two names that the table does not know, for they are no other model's: ``--map`` is
for them. One is named for all that have a rule."""


def reads_as_one(one, other):
    """Whether two names are those of one tensor."""
    names = Names()
    (whole, *module, reading, expert), (whole_too, *module_too, reading_too, expert_too) = map(names.read, (one, other))
    if whole == whole_too:
        return True
    if reading is None or reading_too is None:
        return False
    return (module, expert) == (module_too, expert_too) and (reading.parts, reading.kind) == (
        reading_too.parts,
        reading_too.kind,
    )


def holds(fact):
    """Whether pieces by the table, in both directions, are what transformers makes of random tensors."""
    sides = [{name: tensor.numpy() for name, tensor in side.items()} for side in conversion_facts.sides_of(fact)]
    for base, tuned in (sides, sides[::-1]):
        assembly = assemble(assembled_values.described(base), assembled_values.described(tuned))
        assembled_values.check(assembly, base, tuned)


@pytest.mark.parametrize("fact", [fact for fact in FACTS if conversion_facts.is_converter(fact)], ids=str)
def test_every_conversion_of_tensors_is_in_the_table(fact):
    if CONVERSIONS_LEFT_OUT.keys().isdisjoint(fact.models):
        holds(fact)


def test_what_is_left_out_is_not_in_the_table():
    left_out = set()
    for fact in FACTS:
        if conversion_facts.is_converter(fact) and fact.models[0] in CONVERSIONS_LEFT_OUT:
            try:
                holds(fact)
            except AssertionError:
                left_out.add(fact.models[0])
    assert left_out == set(CONVERSIONS_LEFT_OUT)


def test_other_names_of_a_tensor_are_in_the_table_or_left_to_the_user():
    unread = set()
    for fact in FACTS:
        if not conversion_facts.is_converter(fact):
            name, becomes = conversion_facts.renamed(fact)
            assert name != becomes, fact
            if not reads_as_one(name, becomes):
                unread.add(fact.models[0])
    assert unread - TESTED_WHOLE == set(RENAMES_LEFT_OUT.split())
