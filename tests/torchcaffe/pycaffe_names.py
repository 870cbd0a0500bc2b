"""Every name of pycaffe's interface, and the test that uses it: `file::test` in this folder.

A name without a dot is one of the module `caffe`; Net, Blob, Layer (a Python layer's), Solver and Timer stand for objects.
docs/render_torchcaffe.py writes the same list into docs/torchcaffe.md.
"""
from __future__ import annotations

_BY_TEST = {
    "test_pycaffe.py::test_the_module_says_what_it_is": "TRAIN TEST __version__ layer_type_list",
    "test_pycaffe.py::test_seeds_and_modes_can_be_set": "set_mode_cpu set_mode_gpu set_device set_random_seed",
    "test_pycaffe.py::test_log_writes_a_line_of_the_user_s": "init_log log",
    "test_pycaffe.py::test_a_script_for_several_gpus_runs_with_one":
        "solver_count set_solver_count solver_rank set_solver_rank set_multiprocess has_nccl NCCL NCCL.new_uid NCCL.bcast",
    "test_pycaffe.py::test_a_timer_measures_milliseconds": "Timer Timer.start Timer.stop Timer.ms",
    "test_pycaffe.py::test_a_net_is_made_by_position_or_by_name_in_the_new_form_and_the_old": "Net Net.save",
    "test_pycaffe.py::test_layers_have_types_blobs_and_names":
        "Net.layers Net.layer_dict Net.params Net.top_names Net.bottom_names Net.blob_loss_weights Net._layer_names",
    "test_pycaffe.py::test_blobs_have_shapes_and_live_arrays":
        "Net.blobs Net.inputs Net.outputs Net.clear_param_diffs Net._forward Net._backward "
        "Blob.data Blob.diff Blob.shape Blob.count Blob.num Blob.channels Blob.height Blob.width Blob.reshape",
    "test_pycaffe.py::test_weights_go_out_and_in_as_hdf5": "Net.save_hdf5 Net.load_hdf5",
    "test_pycaffe.py::test_hooks_are_called_around_every_layer":
        "Net.before_forward Net.after_forward Net.before_backward Net.after_backward",
    "test_pycaffe.py::test_backward_from_a_layer_takes_its_tops_diffs_or_the_net_s_outputs": "Net.backward",
    "test_pycaffe.py::test_a_python_layer_s_object_is_in_the_net":
        "Layer Layer.blobs Layer.blobs.add_blob Layer.type Layer.param_str Layer.phase "
        "Layer.setup Layer.reshape Layer.forward Layer.backward",
    "test_pycaffe.py::test_a_solver_shows_its_nets_its_parameters_and_its_rate":
        "Solver.net Solver.test_nets Solver.iter Solver.param Solver.lr Solver.step",
    "test_pycaffe.py::test_get_solver_gives_the_class_that_the_file_names":
        "get_solver SGDSolver NesterovSolver AdaGradSolver RMSPropSolver AdaDeltaSolver AdamSolver",
    "test_pycaffe.py::test_apply_update_takes_the_diffs_as_they_are": "Solver.apply_update",
    "test_pycaffe.py::test_another_net_can_use_the_trained_weights": "Solver.share_weights",
    "test_pycaffe.py::test_solve_runs_to_max_iter_and_restore_goes_on_from_a_snapshot": "Solver.solve Solver.restore Solver.snapshot",
    "test_solver.py::test_callbacks_run_before_and_in_every_iteration": "Solver.add_callback",
    "test_net.py::test_forward_returns_live_outputs_and_takes_inputs_by_name": "Net.forward",
    "test_net.py::test_reshaping_an_input_reaches_every_blob": "Net.reshape",
    "test_net.py::test_saved_weights_load_by_layer_name": "Net.copy_from",
    "test_net.py::test_nets_that_share_see_each_other_s_updates": "Net.share_with",
    "test_data_memory.py::test_batches_follow_each_other_and_wrap": "Net.set_input_arrays",
    "test_batches.py::test_forward_all_runs_as_many_batches_as_it_needs": "Net.forward_all",
    "test_batches.py::test_forward_backward_all_gives_both_results_for_all_items": "Net.forward_backward_all",
    "test_batches.py::test_private_names_count_blobs_as_pycaffe_does":
        "Net._blob_names Net._blobs Net._inputs Net._outputs Net._bottom_ids Net._top_ids Net._blob_loss_weights",
    "test_batches.py::test_arrays_of_different_lengths_or_none_are_refused": "Net._batch",
    "test_io.py::test_a_datum_gives_back_its_array": "io.array_to_datum io.datum_to_array",
    "test_io.py::test_a_blob_gives_back_its_arrays": "io.array_to_blobproto io.blobproto_to_array",
    "test_io.py::test_a_list_of_arrays_survives_its_serialized_vector":
        "io.arraylist_to_blobprotovector_str io.blobprotovector_str_to_arraylist",
    "test_io.py::test_an_image_is_made_ready_step_by_step":
        "io.Transformer.set_channel_swap io.Transformer.set_raw_scale io.Transformer.set_mean io.Transformer.set_input_scale "
        "io.Transformer.preprocess io.Transformer.deprocess",
    "test_io.py::test_any_order_of_channels_and_axes_is_undone": "io.Transformer io.Transformer.set_transpose",
    "test_io.py::test_image_files_are_read_as_numbers_from_0_to_1": "io.load_image",
    "test_io.py::test_resized_images_have_scikit_image_s_numbers": "io.resize_image",
    "test_io.py::test_resize_is_what_pycaffe_s_io_has_of_scikit_image": "io.resize",
    "test_io.py::test_zoom_is_what_pycaffe_s_io_has_of_scipy": "io.zoom",
    "test_io.py::test_skimage_is_there_as_recipes_use_it": "io.skimage",
    "test_io.py::test_ten_crops_are_corners_centre_and_mirrors": "io.oversample",
    "test_net_spec.py::test_names_come_from_the_attributes": "NetSpec NetSpec.to_proto layers params",
    "test_net_spec.py::test_what_has_no_name_is_called_by_its_type_in_the_order_of_the_net": "to_proto net_spec.Top.to_proto",
    "test_net_spec.py::test_a_layer_without_tops_is_called_as_it_is_assigned": "net_spec.Function net_spec.Top",
    "test_net_spec.py::test_a_spec_can_be_looked_into_and_changed": "NetSpec.keys NetSpec.vals NetSpec.update",
    "test_net_spec.py::test_assign_proto_fills_messages_from_lists_and_dicts": "net_spec.assign_proto",
    "test_net_spec.py::test_layers_and_params_know_only_what_could_be_there": "net_spec.param_name_dict",
    "test_draw.py::test_every_layer_and_every_blob_is_a_node_with_what_it_is": "draw.get_pydot_graph",
    "test_draw.py::test_graphviz_gets_the_graph_and_the_type_of_picture": "draw.draw_net draw.draw_net_to_file",
    "test_coord_map.py::test_the_map_of_one_layer": "coord_map.coord_map",
    "test_coord_map.py::test_maps_meet_at_the_nearest_common_blob": "coord_map.coord_map_from_to",
    "test_coord_map.py::test_maps_are_composed_and_inverted": "coord_map.compose coord_map.inverse coord_map.AxisMismatchException",
    "test_coord_map.py::test_a_crop_brings_pixels_back_over_those_they_come_from": "coord_map.crop",
    "test_coord_map.py::test_layers_without_a_map_end_the_search": "coord_map.UndefinedMapException",
    "test_classifier.py::test_a_classifier_averages_ten_crops": "Classifier Classifier.predict",
    "test_classifier.py::test_a_detector_classifies_windows": "Detector Detector.detect_windows",
    "test_classifier.py::test_context_inside_the_image_is_its_pixels": "Detector.crop",
    "test_vectors.py::test_a_vector_does_what_boost_python_s_does": "_caffe.StringVec",
    "test_vectors.py::test_vectors_are_where_pycaffe_has_them":
        "_caffe.BlobVec _caffe.LayerVec _caffe.IntVec _caffe.DtypeVec _caffe.NetVec",
    "test_vectors.py::test_a_python_layer_gets_vectors": "_caffe.BlobVec.add_blob _caffe.RawBlobVec _caffe.BoolVec",
    "test_alias.py::test_a_script_runs_unmodified":
        "proto.caffe_pb2 pycaffe.Net pycaffe.SGDSolver _caffe.Blob _caffe.Layer _caffe.LayerParameter _caffe.Solver _caffe.SolverParameter",
}
NAMES: dict[str, str] = {name: test for test, names in _BY_TEST.items() for name in names.split()}
