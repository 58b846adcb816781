"""The arguments that the golden folder of each name was made with: those of PEFT's configuration, and three keys.

peft_type: the method; without it LoRA. base: which of `zoo.BASES` is adapted; without it "zoo". call: further arguments
of the model's forward. A name begins with the method's or the variant's, so that `pytest -k loha` selects.
Where PEFT 0.21 computes something wrong there is no case.
"""

from __future__ import annotations

from typing import Any

import torch

LINEARS = ["up", "down"]
POLY: dict[str, Any] = {"base": "decoder", "task_type": "CAUSAL_LM", "call": {"task_ids": torch.tensor([1, 0])}}

# The first cases; their random numbers come from their place in this dict, so new ones go below.
LORA: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 8},
    "regex": {"target_modules": r".*\.1\.(up|proj)", "r": 3, "fan_in_fan_out": False},
    "all_linear_names": {"target_modules": ["up", "down", "proj", "head"], "r": 2, "exclude_modules": ["layers.0.up"]},
    "layers_to_transform": {"target_modules": ["up"], "r": 2, "layers_to_transform": [1]},
    "conv1d_gpt2": {"target_modules": ["proj"], "r": 4, "fan_in_fan_out": True},
    "embedding": {"target_modules": ["emb"], "r": 4, "lora_alpha": 12},
    "convs": {"target_modules": ["conv1", "conv2", "conv3"], "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": ["up"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ["up", "down"], "r": 4, "lora_alpha": 8,
        "rank_pattern": {"layers.0.up": 2, r"layers\.1\..*": 6}, "alpha_pattern": {"down": 3},
    },
    "rslora_patterns": {
        "target_modules": ["up", "down"], "r": 4, "lora_alpha": 8, "use_rslora": True,
        "rank_pattern": {"up": 5}, "alpha_pattern": {"layers.1.down": 7},
    },
    "bias_all": {"target_modules": ["up", "down"], "r": 2, "bias": "all"},
    "bias_lora_only": {"target_modules": ["up", "down"], "r": 2, "bias": "lora_only"},
    "lora_bias": {"target_modules": ["up", "proj"], "r": 2, "lora_bias": True},
    "modules_to_save": {"target_modules": ["up"], "r": 2, "modules_to_save": ["head", "norm"]},
    "everything": {
        "target_modules": ["up", "down", "proj", "emb", "conv1", "conv2", "conv3"], "r": 3, "lora_alpha": 4,
        "use_rslora": True, "rank_pattern": {"emb": 2, "conv2": 4}, "modules_to_save": ["head"],
    },
}  # fmt: skip

LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": LINEARS, "r": 3, "use_dora": True},
    "dora_conv1d_gpt2": {"target_modules": ["proj"], "r": 2, "use_dora": True, "fan_in_fan_out": True},
    "dora_embedding": {"target_modules": ["emb"], "r": 2, "lora_alpha": 5, "use_dora": True},
    "dora_convs": {"target_modules": ["conv1", "conv2", "conv3"], "r": 2, "use_dora": True},
    "dora_rslora_patterns": {
        "target_modules": LINEARS, "r": 2, "use_dora": True, "use_rslora": True, "rank_pattern": {"up": 3},
    },
    "bdlora": {
        "target_modules": LINEARS, "r": 4,
        "use_bdlora": {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"], "nblocks": 2},
    },
    "bdlora_mixed": {
        "target_modules": ["up", "head"], "r": 4,
        "use_bdlora": {"target_modules_bd_a": ["head"], "nblocks": 4, "match_strict": False},
    },
    "kasa": {"target_modules": LINEARS, "r": 3, "kasa_config": {}},
    "velora": {"target_modules": LINEARS, "r": 3, "velora_config": {"num_groups": 4}},
    "velora_random": {
        "target_modules": ["up", "proj"], "r": 3, "fan_in_fan_out": False,
        "velora_config": {"num_groups": 2, "scale": 0.5, "init_type": "random"},
    },
    "velora_once": {
        "target_modules": ["down"], "r": 3, "velora_config": {"num_groups": 2, "init_type": "batch_average_once"},
    },
    "monteclora": {"target_modules": LINEARS, "r": 3, "monteclora_config": {"num_samples": 2, "buffer_size": 3}},
    "monteclora_scale": {
        "target_modules": ["proj"], "r": 2, "fan_in_fan_out": True,
        "monteclora_config": {"num_samples": 3, "buffer_size": 2, "sample_scaler": 0.1, "use_entropy": True},
    },
    "mica": {"target_modules": LINEARS, "r": 3, "init_lora_weights": "mica"},
    "mica_embedding": {"target_modules": ["emb"], "r": 3, "init_lora_weights": "mica"},
    "alora": {  # the input's first row has the tokens
        "target_modules": LINEARS, "r": 3, "alora_invocation_tokens": [15, 5], "task_type": "CAUSAL_LM",
        "base": "decoder",
    },
    "alora_offsets": {
        "target_modules": ["up"], "r": 3, "alora_invocation_tokens": [15, 5], "task_type": "CAUSAL_LM",
        "call": {"alora_offsets": [100, 1]}, "base": "decoder",
    },
    "gaussian": {"target_modules": LINEARS, "r": 3, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": LINEARS, "r": 4, "init_lora_weights": "orthogonal"},
    "olora": {"target_modules": LINEARS, "r": 3, "init_lora_weights": "olora"},
    "pissa": {"target_modules": LINEARS, "r": 3, "init_lora_weights": "pissa"},
    "pissa_rslora": {"target_modules": ["up"], "r": 3, "init_lora_weights": "pissa", "use_rslora": True},
    "parameters": {"target_modules": [], "target_parameters": ["up", "down"], "r": 2, "base": "experts"},
    "parameters_and_modules": {
        "target_modules": ["head"], "target_parameters": ["flat", "up"], "r": 2, "lora_alpha": 3, "base": "experts",
    },
    "parameters_rslora_patterns": {
        "target_modules": [], "target_parameters": ["up", "flat"], "r": 2, "use_rslora": True, "base": "experts",
        "rank_pattern": {"experts.up": 3}, "alpha_pattern": {"experts.flat": 2},
    },
    "trainable_tokens_with_lora": {"target_modules": LINEARS, "r": 2, "trainable_token_indices": {"emb": [1, 5, 2]}},
    "layer_replication": {
        "target_modules": LINEARS, "r": 2, "layer_replication": [[0, 2], [1, 2], [0, 1]], "base": "decoder",
    },
    "attention": {"target_modules": ["attn"], "r": 2, "lora_alpha": 3, "base": "attention"},
    "attention_rslora": {"target_modules": ["attn", "head"], "r": 2, "use_rslora": True, "base": "attention"},
}  # fmt: skip


def _case(peft_type: str, **options: Any) -> dict[str, Any]:
    return {"peft_type": peft_type, "target_modules": LINEARS, **options}


METHODS: dict[str, dict[str, Any]] = {
    "adalora": _case("ADALORA", init_r=4, target_r=2, total_step=10),
    "adalora_conv1d_gpt2": _case("ADALORA", target_modules=["proj"], init_r=3, total_step=10, fan_in_fan_out=True),
    "adalora_pruned": _case("ADALORA", init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, lora_alpha=3),
    "adamss": _case("ADAMSS", r=8, num_subspaces=2),
    "adamss_subspaces": _case("ADAMSS", r=12, num_subspaces=3, subspace_rank=2),
    "adamss_dynamic": _case("ADAMSS", r=8, num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, svd_threshold=0.7),
    "adamss_asa": _case("ADAMSS", target_modules=["up"], r=8, num_subspaces=2, use_asa=True, asa_target_subspaces=2),
    "boft": _case("BOFT"),
    "boft_block_num": _case("BOFT", boft_block_size=0, boft_block_num=4),
    "boft_bias": _case("BOFT", boft_block_size=8, bias="boft_only"),
    "boft_conv": _case("BOFT", target_modules=["conv2", "pointwise"], base="pixels"),
    "ia3": _case("IA3", feedforward_modules=[]),
    "ia3_feedforward": _case("IA3", feedforward_modules=["down"]),
    "ia3_conv1d_gpt2": _case("IA3", target_modules=["proj"], feedforward_modules=["proj"], fan_in_fan_out=True),
    "ia3_convs": _case("IA3", target_modules=["conv2", "conv3"], feedforward_modules=["conv3"]),
    "beft": _case("BEFT", target_modules=["up", "head"]),
    "beft_no_bias": _case("BEFT"),
    "poly": _case("POLY", r=3, n_tasks=3, n_skills=2, **POLY),  # more tasks than rows: mixed for each row
    "poly_splits": _case("POLY", r=2, n_tasks=2, n_skills=3, n_splits=4, **POLY),
    "lily": _case("LILY", r=3),
    "lily_strides": _case("LILY", r=3, stride_A=2, num_B=3, scaling=0.5),
    "loha": _case("LOHA", r=3, alpha=5),
    "loha_conv": _case("LOHA", target_modules=["conv1", "conv2"], r=2),
    "loha_conv_effective": _case("LOHA", target_modules=["conv1", "conv2"], r=2, use_effective_conv2d=True),
    "loha_patterns": _case("LOHA", r=3, rank_pattern={"up": 2}, alpha_pattern={"layers.0.down": 2}),
    "lokr": _case("LOKR", r=2, alpha=3),
    "lokr_full": _case("LOKR", r=8),
    "lokr_both": _case("LOKR", r=1, decompose_both=True, decompose_factor=4),
    "lokr_conv": _case("LOKR", target_modules=["conv1", "conv2"], r=1),
    "lokr_conv_effective": _case("LOKR", target_modules=["conv2"], base="pixels", r=1, use_effective_conv2d=True),
    "lokr_patterns": _case("LOKR", r=2, rank_pattern={"up": 1}, alpha_pattern={"layers.0.down": 2}),
    "oft": _case("OFT", oft_block_size=4),
    "oft_r": _case("OFT", r=2, oft_block_size=0, bias="oft_only"),
    "oft_block_share": _case("OFT", oft_block_size=4, block_share=True),
    "oft_coft": _case("OFT", oft_block_size=4, coft=True, eps=0.01),
    "oft_cayley": _case("OFT", oft_block_size=4, use_cayley_neumann=False),
    "oft_cayley_terms": _case("OFT", oft_block_size=4, num_cayley_neumann_terms=3),
    "oft_coft_cayley": _case("OFT", oft_block_size=8, coft=True, eps=0.02, use_cayley_neumann=False, block_share=True),
    "oft_embedding": _case("OFT", target_modules=["emb"], oft_block_size=4),
    "oft_conv_pointwise": _case("OFT", target_modules=["pointwise"], oft_block_size=4, base="pixels"),
    "ln_tuning": _case("LN_TUNING", target_modules=["norm"]),
    "ln_tuning_modules": _case("LN_TUNING", target_modules=["layers.1.norm"], modules_to_save=["head"]),
    "vera": _case("VERA", r=4),
    "vera_no_projection": _case("VERA", r=4, save_projection=False, projection_prng_key=3, d_initial=0.5),
    "vera_conv1d_gpt2": _case("VERA", target_modules=["proj"], r=3, fan_in_fan_out=True, bias="vera_only"),
    "frod": _case("FROD", progressbar=False, sparse_rate=0.05),
    "frod_no_projection": _case(
        "FROD", progressbar=False, sparse_rate=0.1, save_projection=False, projection_prng_key=3,
    ),
    "frod_conv1d_gpt2": _case(
        "FROD", target_modules=["proj"], progressbar=False, sparse_rate=0.05, regularization_alpha=0.1,
        fan_in_fan_out=True,
    ),
    "pvera": _case("PVERA", r=4),
    "pvera_no_projection": _case("PVERA", r=4, save_projection=False, projection_prng_key=3, d_initial=0.5),
    "pvera_conv1d_gpt2": _case("PVERA", target_modules=["proj"], r=3, fan_in_fan_out=True),
    "fourierft": _case("FOURIERFT", n_frequency=20),
    "fourierft_pattern": _case(
        "FOURIERFT", n_frequency=20, scaling=30.0, random_loc_seed=5, n_frequency_pattern={"up": 7},
    ),
    "fourierft_conv1d_gpt2": _case("FOURIERFT", target_modules=["proj"], n_frequency=9, fan_in_fan_out=True),
    "glora": _case("GLORA", r=3),
    "glora_vector": _case("GLORA", r=3, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "glora_constant": _case("GLORA", r=3, config_A_B="constant", config_C="none", config_D_E="constant"),
    "glora_none": _case("GLORA", r=3, config_A_B="none", config_C="lora", config_D_E="none"),
    "hra": _case("HRA", r=4),
    "hra_odd": _case("HRA", r=3, bias="hra_only"),
    "hra_gs": _case("HRA", r=4, apply_GS=True),
    "hra_conv": _case("HRA", target_modules=["conv2", "pointwise"], r=4, base="pixels"),
    "vblora": _case("VBLORA", r=2, num_vectors=6, vector_length=8),
    "vblora_topk": _case("VBLORA", r=3, num_vectors=6, vector_length=4, topk=3),
    "vblora_only_topk": _case("VBLORA", r=2, num_vectors=6, vector_length=8, save_only_topk_weights=True),
    "vblora_conv1d_gpt2": _case(
        "VBLORA", target_modules=["proj"], r=2, num_vectors=6, vector_length=8, fan_in_fan_out=True,
    ),
    "unilora": _case("UNILORA", r=2, theta_d_length=12),
    "unilora_indices": _case("UNILORA", r=3, theta_d_length=12, save_indices=True, proj_seed=7),
    "unilora_conv1d_gpt2": _case("UNILORA", target_modules=["proj"], r=2, theta_d_length=12, fan_in_fan_out=True),
    "miss": _case("MISS", r=4),
    "miss_uneven": _case("MISS", r=5, bias="miss_only"),
    "miss_bat": _case("MISS", r=4, init_weights="bat"),
    "miss_mini": _case("MISS", r=8, mini_r=4, init_weights="mini"),
    "randlora": _case("RANDLORA", r=5),
    "randlora_no_projection": _case("RANDLORA", r=6, save_projection=False, projection_prng_key=3, randlora_alpha=60),
    "randlora_sparse": _case("RANDLORA", r=5, sparse=True),
    "randlora_very_sparse": _case("RANDLORA", r=5, very_sparse=True),
    "randlora_conv1d_gpt2": _case("RANDLORA", target_modules=["proj"], r=5, fan_in_fan_out=True),
    "road": _case("ROAD", group_size=4),
    "road_2": _case("ROAD", group_size=8, variant="road_2"),
    "road_4": _case("ROAD", group_size=4, variant="road_4"),
    "trainable_tokens": _case("TRAINABLE_TOKENS", target_modules=["emb"], token_indices=[1, 5, 2]),
    "trainable_tokens_linear": _case("TRAINABLE_TOKENS", target_modules=["down"], token_indices=[3, 1]),
    "hira": _case("HIRA", r=3),
    "hira_patterns": _case("HIRA", r=3, rank_pattern={"layers.1.up": 2}),
    "hira_conv1d_gpt2": _case("HIRA", target_modules=["proj"], r=3, fan_in_fan_out=True),
    "hira_embedding": _case("HIRA", target_modules=["emb"], r=3),
    "hira_convs": _case("HIRA", target_modules=["conv1", "conv2", "conv3"], r=2),
    "shira": _case("SHIRA", r=2, random_seed=3),
    "shira_unseeded": _case("SHIRA", r=1),
    "c3a": _case("C3A", block_size=8),
    "c3a_pattern": _case("C3A", block_size=8, block_size_pattern={"up": 4}, bias="c3a_only"),
    "c3a_alone": _case("C3A", target_modules=["layers.1.up"], block_size=8),
    "waveft": _case("WAVEFT", n_frequency=20),
    "waveft_db2": _case("WAVEFT", n_frequency=20, wavelet_family="db2", scaling=5.0, random_loc_seed=3),
    "waveft_coif": _case("WAVEFT", n_frequency=12, wavelet_family="coif1", n_frequency_pattern={"down": 5}),
    "waveft_no_idwt": _case("WAVEFT", n_frequency=20, use_idwt=False),
    "waveft_proportional": _case("WAVEFT", target_modules=["up", "head"], n_frequency=20, proportional_parameters=True),
    "waveft_conv1d_gpt2": _case("WAVEFT", target_modules=["proj"], n_frequency=9, fan_in_fan_out=True),
    "osf": _case("OSF"),
    "osf_rank": _case("OSF", effective_rank=4, rank_pattern={"layers.1.up": 0.25}),
    "osf_clamped": _case("OSF", effective_rank=5, rank_pattern={"layers.1.up": 100, "layers.0.down": 1.0}),
    "delora": _case("DELORA", r=3),
    "delora_patterns": _case(
        "DELORA", r=3, delora_lambda=4, rank_pattern={"up": 2}, lambda_pattern={"layers.0.down": 7}, bias="delora_only",
    ),
    "gralora": _case("GRALORA", r=4, alpha=6),
    "gralora_hybrid": _case("GRALORA", r=8, hybrid_r=2, gralora_k=4, alpha=5),
    "gralora_conv1d_gpt2": _case("GRALORA", target_modules=["proj"], r=4, fan_in_fan_out=True),
    "tinylora": _case("TINYLORA", u=4),
    "tinylora_tied": _case("TINYLORA", r=3, u=5, weight_tying=1.0, projection_seed=7),
    "tinylora_half_tied": _case("TINYLORA", u=4, weight_tying=0.5, save_projection=False),
    "tinylora_conv1d_gpt2": _case("TINYLORA", target_modules=["proj"], u=4, fan_in_fan_out=True),
    "tinylora_embedding": _case("TINYLORA", target_modules=["emb"], u=4),
    "psoft": _case("PSOFT", r=4, psoft_alpha=4),
    "psoft_pissa_scaled": _case("PSOFT", r=4, psoft_alpha=8, ab_svd_init="pissa_init", psoft_mag_b=False),
    "psoft_neumann": _case("PSOFT", r=4, psoft_alpha=4, use_cayley_neumann=True, num_cayley_neumann_terms=3),
    "psoft_neumann_eps": _case("PSOFT", r=4, psoft_alpha=4, use_cayley_neumann=True, cayley_neumann_eps=0.1),
    "psoft_plain": _case("PSOFT", r=3, psoft_alpha=5, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False),
    "psoft_lowrank": _case("PSOFT", r=3, psoft_alpha=3, psoft_svd="lowrank", psoft_svd_lowrank_niter=4),
    "peanut": _case("PEANUT", r=3),
    "peanut_depth": _case("PEANUT", r=3, depth=2, act_fn="gelu", scaling=0.5),
    "supertuning": _case("SUPERTUNING", sparsity=0.9),
    "supertuning_bottom": _case("SUPERTUNING", sparsity=0.8, select_top=False, save_precomputed_indices=False),
    "supertuning_supra": _case("SUPERTUNING", sparsity=0.9, r=2, lora_alpha=3.0),
    "deft": _case("DEFT", r=3),
    "deft_qr": _case("DEFT", r=3, decomposition_method="qr", alpha=2, bias="deft_only"),
    "deft_para": _case("DEFT", r=3, para=True, init_scale=0.5),
    "deft_conv1d_gpt2": _case("DEFT", target_modules=["proj"], r=3, fan_in_fan_out=True),
}  # fmt: skip

CASES = {**LORA, **LORA_VARIANTS, **METHODS}
