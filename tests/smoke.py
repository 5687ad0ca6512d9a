"""What `pytest -m smoke` runs: a minute for the inner loop, something of every part of the project.

Tests by file and function, with all of their parameters, or with one behind it in brackets. Other
files are not even imported then. Kernels of AscendC are not among them: to build their twin takes
longer than a minute.
"""

SMOKE = {
    "index maths": ("test_pattern.py::test_segments_and_boxes_cover_every_token_once",),
    "every backend": (
        "test_attention.py::test_scale",
        "test_triton.py::test_one_key_mask_of_two",
        "test_npu_fusion.py::test_rows_that_attend_to_nothing",
        "test_pingpong.py::test_keys_are_masked[all]",
        "test_backends.py",
    ),
    "the original's numbers": (
        "test_goldens.py::test_golden[N72.k4.group.vmask-reference]",
        "test_goldens.py::test_golden[N72.k4.group.vmask-sdpa]",
    ),
    "gradients": (
        "test_operator.py::test_gradcheck_in_fp64",
        "test_operator.py::test_opcheck_of_the_backward",
        "test_derivatives.py::test_a_row_without_keys_passes_no_gradient",
    ),
    "graphs": ("test_operator.py::test_a_changing_scale_compiles",
               "test_operator.py::test_saved_graphs_find_the_operators_as_they_were"),
    "text beside the video": (
        "test_edges.py::test_more_sub_sequences_than_tokens[sdpa-torch.float32]",
        "test_edges.py::test_more_sub_sequences_than_tokens[reference-torch.float64]",
    ),
    "masks": ("test_edges.py::test_nothing_to_attend_to",),
    "what makes no sense": ("test_edges.py::test_bad_arguments_are_named_before_any_work",),
    "packing": ("test_pack.py::test_every_row_is_where_the_pattern_says",
                "test_pack.py::test_the_kernels_do_what_eager_does[single]",
 "test_pack.py::test_the_kernels_do_what_eager_does[block]"),
    "SUV": ("test_suv.py::test_outputs_and_gradients_of_the_original",),
    "WF-VAE": ("test_wfvae.py::test_moments_of_the_original",
               "test_wfvae.py::test_decoding_in_pieces_is_the_whole[torch.float32-eval]"),
    "prompts": ("test_text.py::test_neighbours_do_not_matter",),
    "sampling": ("test_pipeline.py::test_sampling_is_the_formulas", "test_flow.py::test_ten_steps"),
    "eight bits": ("test_hif8.py::test_a_linear_layer_as_recorded",),
    "files of clips": ("test_video.py::test_every_frame_comes_back_exactly",
                       "test_manifest.py::test_records_become_rows",
                       "test_data_import.py::test_clips_are_read_out_of_a_shard",
                       "test_dataset.py::test_a_clip"),
    "caches": ("test_cache.py::test_batches_are_those_of_the_encoders",),
    "recipes": ("test_recipe.py::test_captions_of_other_names_go_through_a_cache",),
    "training": ("test_train.py::test_the_stages_are_walked",
                 "test_wfvae_train.py::test_the_loss_falls"),
    "checkpoints": ("test_checkpoint.py::test_all_comes_back_bit_for_bit",),
    "the command line": (
"test_cli.py::test_info_lists_every_backend", "test_cli.py::test_bad_arguments"),
    "measuring": ("test_bench.py::test_run_prints_the_ceiling_and_writes_rows",),
    "the house": ("test_imports.py::test_arrows_run_one_way",
                  "test_imports.py::test_index_maths_only_in_pattern",
                  "test_docs.py::test_every_path_that_is_named_exists",
                  "test_docs.py::test_links_lead_somewhere"),
}  # fmt: skip

NAMES = {name for names in SMOKE.values() for name in names}
FILES = {name.partition("::")[0] for name in NAMES}


def named(path, test):
    """Which names of these a test has, ``test_x[3]`` of the file ``path``."""
    name = f"{path.name}::{test}"
    return NAMES & {path.name, name, name.partition("[")[0]}
