//! The backward pass on cooperative matrices (`scripts/vulkan --coop cargo test` has a device with some): the cases of the other
//! backward kernels, in f16. Says so where there is no such device.

mod common;

use common::backward::{Ask, backward, check_all, prepare};
use common::cases::{cases, dims};
use common::coop::{context, known_matrices, spirv_error, validator, workgroup_bytes};
use common::{Case, case, full};
use wgpu_flash_attention::Causal::BottomRight;
use wgpu_flash_attention::elements::ElementModule;
use wgpu_flash_attention::specialize::coop_backward_modules;
use wgpu_flash_attention::tune::{self, CoopBackwardTile};
use wgpu_flash_attention::{ElementType, Error, Kernel, PlanOptions, Problem, Shape, wgpu};

fn tile(subgroups: u32, matrices: u32, step: u32, columns: u32, ahead: bool) -> CoopBackwardTile {
    CoopBackwardTile { subgroups, matrices, step, columns, ahead }
}

fn tiled(tiles: [CoopBackwardTile; 2]) -> PlanOptions {
    PlanOptions { coop_backward_tiles: Some(tiles), ..backward(Kernel::Coop) }
}

/// One subgroup. 16 is a multiple of every size that matrices have.
fn small() -> PlanOptions {
    tiled([tile(1, 1, 16, 128, true); 2])
}

/// Gradients in blocks of 16 columns, V in registers, several matrices of keys and rows, no loads ahead.
fn blocks() -> PlanOptions {
    tiled([tile(2, 2, 32, 16, false); 2])
}

fn named<const N: usize>(cases: [(&str, Case); N]) -> [(String, Case); N] {
    cases.map(|(name, case)| (name.to_string(), case))
}

#[test]
fn all_cases() {
    let Some(context) = context() else { return };
    let ways = [("coop", context, backward(Kernel::Coop)), ("small tile", context, small())];
    check_all(&prepare(cases(), ElementType::F16, Ask::default()), &ways);
}

/// On a processor, only head dims up to 64 and the smallest tile: software Vulkan takes minutes to compile larger ones.
#[test]
fn all_dims() {
    let Some(context) = context() else { return };
    let software = context.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    let mut dims = dims();
    dims.retain(|(_, case)| {
        let shape = &case.problem.shape;
        !software || shape.head_dim.max(shape.head_dim_v) <= 64
    });
    let options = if software { tiled([tile(1, 1, 8, 128, true); 2]) } else { backward(Kernel::Coop) };
    check_all(&prepare(dims, ElementType::F16, Ask::default()), &[("coop", context, options)]);
}

/// Gradients whose columns no workgroup has all of.
#[test]
fn blocks_of_columns() {
    let Some(context) = context() else { return };
    let cases = named([
        ("both head dims", case(2, [2, 1], [37, 70], [40, 33]).causal(BottomRight)),
        ("head dim of the values", case(1, [2, 2], [70, 37], [16, 40]).softcap(2.0)),
        ("head dim", case(1, [2, 1], [20, 20], [33, 7]).odd()),
    ]);
    check_all(&prepare(cases, ElementType::F16, Ask::default()), &[("blocks", context, blocks())]);
}

/// Many steps of the loop.
#[test]
fn many_keys_and_rows() {
    let Some(context) = context() else { return };
    let cases = named([
        ("many keys", case(1, [2, 1], [70, 1000], [16, 12]).causal(BottomRight)),
        ("many rows", case(1, [2, 1], [1000, 70], [16, 12]).window(300, -1)),
        ("huge scores", case(1, [2, 1], [300, 300], [16, 12]).scale(1.0).integers(40)),
    ]);
    check_all(&prepare(cases, ElementType::F16, Ask::default()), &[("coop", context, backward(Kernel::Coop))]);
}

fn few() -> [(String, Case); 5] {
    named([
        ("aligned", case(2, [4, 2], [37, 45], [16, 12]).causal(BottomRight)),
        ("odd", case(2, [2, 1], [19, 23], [7, 5]).odd().seqlens(&[23, 4]).softcap(2.0)),
        ("packed", case(2, [4, 2], [35, 35], [8, 4]).packed().window(5, 3)),
        ("no keys", case(1, [1, 1], [3, 0], [16, 12])),
        ("no queries", case(1, [2, 1], [0, 3], [16, 12])),
    ])
}

#[test]
fn gradients_of_lse_and_sums_with_what_is_there() {
    let Some(context) = context() else { return };
    for (grad_lse, accumulate) in [(true, false), (false, true), (true, true)] {
        let ways = [("coop", context, backward(Kernel::Coop)), ("blocks", context, blocks())];
        check_all(&prepare(few(), ElementType::F16, Ask { grad_lse, accumulate }), &ways);
    }
}

/// With bounds checks, which would turn an access past a binding into a wrong result.
#[test]
fn within_bounds() {
    let Some(context) = context() else { return };
    let context = context.clone().checked();
    let ways = [("coop", &context, small()), ("blocks", &context, blocks())];
    check_all(&prepare(few(), ElementType::F16, Ask { grad_lse: true, accumulate: true }), &ways);
}

#[test]
fn plans_choose_it_for_f16() {
    let Some(context) = context() else { return };
    let problem = |element_type| Problem::new(Shape::square(1, 2, 64, 16), element_type).with_gradients();
    for (element_type, kernel) in
        [(ElementType::F16, Kernel::Coop), (ElementType::F32, Kernel::Tile), (ElementType::BF16, Kernel::Tile)]
    {
        let plan = context.plan(&problem(element_type)).unwrap();
        assert_eq!(plan.backward_kernel(), Some(kernel));
    }
    let error = context.plan_with(&problem(ElementType::F32), &backward(Kernel::Coop)).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
}

#[test]
fn tiles_that_do_not_divide_are_refused() {
    let Some(context) = context() else { return };
    let problem = Problem::new(Shape::square(1, 2, 64, 16), ElementType::F16).with_gradients();
    let good = tile(1, 1, 16, 16, true);
    for bad in
        [tile(0, 1, 16, 16, true), tile(1, 1025, 16, 16, true), tile(1, 1, 12, 16, true), tile(1, 1, 16, 0, true)]
    {
        for tiles in [[good, bad], [bad, good]] {
            let error = context.plan_with(&problem, &tiled(tiles)).unwrap_err();
            assert!(matches!(error, Error::Tile(_)), "{error}");
        }
    }
}

#[test]
fn contexts_without_matrices_refuse_it() {
    let problem = Problem::new(Shape::square(1, 2, 64, 16), ElementType::F16).with_gradients();
    let error = full().plan_with(&problem, &backward(Kernel::Coop)).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
}

/// Needs no device: naga takes every module, its workgroup memory is what the tile says, and so does the validator of
/// SPIR-V, where it is there.
#[test]
fn modules_are_valid() {
    let validator = validator();
    for (format, layout) in known_matrices() {
        for [head_dim, head_dim_v] in [[1, 1], [8, 24], [31, 33], [64, 64], [128, 128], [256, 200]] {
            for switches in 0..16u32 {
                let on = |n: u32| switches >> n & 1 == 1;
                let shape = Shape { head_dim_v, ..Shape::square(2, 2, 8, head_dim) };
                let mut problem = Problem::new(shape, ElementType::F16).with_gradients();
                problem.query = problem.query.at(on(0).into());
                problem.softcap = on(1).then_some(2.0);
                problem.seqlens_k = on(2);
                problem.gradients.as_mut().unwrap().accumulate = on(3);
                let all = [
                    tune::coop_backward_tiles(format.size, head_dim, head_dim_v),
                    [tile(1, 1, 16, 32, true), tile(2, 2, 32, 16, false)],
                ];
                for tiles in all {
                    let said = [
                        tiles[0].dkdv_bytes(format.size, head_dim, head_dim_v),
                        tiles[1].dq_bytes(format.size, head_dim, head_dim_v),
                    ];
                    let modules = coop_backward_modules(&problem, tiles, format, &layout);
                    for (((specialization, bindings), tile), said) in modules.into_iter().zip(tiles).zip(said) {
                        let text = specialization.source().unwrap().text;
                        assert_eq!(workgroup_bytes(&text), said, "{specialization:?}");
                        let module = ElementModule::new(&text, format, &bindings, on(3))
                            .unwrap_or_else(|error| panic!("{specialization:?}: {error}"));
                        assert_eq!(module.entry_points()[0].1, [tile.subgroups * format.lanes, 1, 1]);
                        let refused = |path| spirv_error(path, "backward_coop.spv", module.spirv());
                        if let Some(error) = validator.as_deref().and_then(refused) {
                            panic!("{specialization:?}: {error}");
                        }
                    }
                }
            }
        }
    }
}
