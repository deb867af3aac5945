//! Sequences so long that Mesa's software driver before version 25 would end the loops over them: each kernel is right there, or refuses
//! the problem. On other drivers all are right.

use flash_attention_testing::backward::{Ask, backward};
use flash_attention_testing::{Case, case, full, naive, tile};
use wgpu_flash_attention::{Error, Kernel, PlanOptions};

/// Whether the driver is one that ends loops.
fn ends_loops() -> bool {
    let info = full().device().adapter_info();
    let major = info.driver_info.strip_prefix("Mesa ").and_then(|version| version.split('.').next()?.parse().ok());
    info.driver == "llvmpipe" && major.is_none_or(|major: u32| major < 25)
}

/// Right, or refused because of the loops; says which.
fn is_planned(case: &Case, options: PlanOptions) -> bool {
    let prepared = case.prepare();
    match full().plan_with(&prepared.problem, &options) {
        Ok(plan) => {
            prepared.check_plan(full(), &plan).unwrap_or_else(|error| panic!("{plan}\n{error}"));
            true
        }
        Err(Error::DriverLoops { needed, found, .. }) => {
            assert!(ends_loops() && needed > found);
            false
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn many_keys() {
    for (keys, dim) in [(12_000, 256), (24_000, 128), (30_000, 64), (48_000, 16)] {
        let long = case(1, [1, 1], [3, keys], [dim, 8]);
        assert_eq!(is_planned(&long, tile()), !ends_loops(), "{keys} keys of {dim}");
        // The plan's own choice is right on every driver, of few queries and, below, of more than decode is taken for.
        assert!(is_planned(&long, PlanOptions::default()));
    }
    let queries = case(1, [1, 1], [20, 30_000], [64, 8]);
    assert!(is_planned(&queries, PlanOptions::default()));
    let decode = PlanOptions::default().kernel(Kernel::Decode);
    assert!(is_planned(&queries, decode));
    assert_eq!(is_planned(&queries, decode.splits(1)), !ends_loops());
    // A window makes the loops short.
    assert!(is_planned(&queries.window(100, 100), tile()));
}

#[test]
fn as_many_keys_as_are_granted() {
    for (keys, dim) in [(7_000, 256), (11_000, 128), (18_000, 64), (28_000, 16)] {
        assert!(is_planned(&case(1, [1, 1], [3, keys], [dim, 8]), tile()), "{keys} keys of {dim}");
    }
    assert!(is_planned(&case(1, [1, 1], [3, 64_500], [8, 8]), naive()));
}

#[test]
fn many_keys_naive() {
    for keys in [64_640, 70_000] {
        assert_eq!(is_planned(&case(1, [1, 1], [3, keys], [8, 8]), naive()), !ends_loops(), "{keys} keys");
    }
}

#[test]
fn many_queries_backward() {
    let planned = |queries: u32, heads: u32, kernel| {
        let prepared = case(1, [heads, 1], [queries, 3], [8, 8]).prepare_backward(Ask::default());
        match full().plan_with(&prepared.problem, &backward(kernel)) {
            Ok(_) => {
                prepared.check(full(), &backward(kernel)).unwrap();
                true
            }
            Err(Error::DriverLoops { .. }) => {
                assert!(ends_loops());
                false
            }
            Err(error) => panic!("{error}"),
        }
    };
    for kernel in [Kernel::Tile, Kernel::Naive] {
        assert!(planned(30_000, 1, kernel), "{kernel}");
        assert_eq!(planned(70_000, 1, kernel), !ends_loops(), "{kernel}");
        // Queries of all heads that share keys are one sum.
        assert_eq!(planned(35_000, 2, kernel), !ends_loops(), "{kernel}");
    }
}
