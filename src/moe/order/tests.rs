use super::*;
use crate::tensor::DType;

fn routing(tokens: usize, experts: usize, capacity: usize, assignment: Assignment) -> Routing {
    Routing {
        tokens,
        experts,
        groups: 1,
        capacity,
        assignment,
        balance_loss: None,
        z_loss: None,
        loads: Tensor::host_zeros([1, experts], DType::I32),
        entropy: Tensor::host_zeros([1], DType::F32),
    }
}

#[test]
fn names_are_read_back_and_unknown_ones_list_the_known() {
    for &kind in OrderKind::ALL {
        assert_eq!(kind.to_string().parse::<OrderKind>().unwrap(), kind);
        assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        assert_eq!(kind.build().name(), kind.name());
    }
    let message = "moe".parse::<OrderKind>().unwrap_err().to_string();
    assert_eq!(message, "unknown order \"moe\": it is one of gshard, tutel, ragged");
}

#[test]
fn sparse_orders_refuse_dense_routings() {
    let (dispatch, combine) = (Tensor::host_zeros([4, 6], DType::F32), Tensor::host_zeros([4, 6], DType::F32));
    let routing = routing(4, 3, 2, Assignment::Dense { dispatch, combine });
    let x = Tensor::host_zeros([4, 5], DType::F32);
    for kind in [OrderKind::Tutel, OrderKind::Ragged] {
        let message = kind.build().dispatch(&Lane::cpu(), &routing, &x).err().unwrap().to_string();
        assert!(message.contains(kind.name()) && message.contains("soft gate"), "{message}");
    }
}

#[test]
fn gshard_refuses_an_unreasonable_mask_before_it_is_made() {
    let (t, e, c) = (16384, 64, 1024);
    let choice = || Tensor::host_zeros([t, 1], DType::I32);
    let weights = Tensor::host_zeros([t, 1], DType::F32);
    let routing = routing(t, e, c, Assignment::TokenChoice { experts: choice(), slots: choice(), weights });
    let x = Tensor::host_zeros([t, 1], DType::BF16);
    let message = GShard.dispatch(&Lane::cpu(), &routing, &x).err().unwrap().to_string();
    for part in ["T = 16384", "E = 64", "C = 1024", "2.0 GiB as bf16", "tutel or ragged"] {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn tokens_must_be_the_routings() {
    let choice = || Tensor::host_zeros([4, 1], DType::I32);
    let weights = Tensor::host_zeros([4, 1], DType::F32);
    let routing = routing(4, 2, 4, Assignment::TokenChoice { experts: choice(), slots: choice(), weights });
    for &kind in OrderKind::ALL {
        let x = Tensor::host_zeros([5, 3], DType::F32);
        let message = kind.build().dispatch(&Lane::cpu(), &routing, &x).err().unwrap().to_string();
        assert!(message.contains("(5, 3)") && message.contains("4 tokens"), "{message}");
    }
}

#[test]
fn bf16_rows_keep_f32_weights_and_gradients() {
    let lane = Lane::cpu();
    let cast = |v: &[f32], shape: [usize; 2]| lane.cast(&Tensor::from_slice(v, shape).unwrap(), DType::BF16).unwrap();
    let floats = |t: &Tensor| lane.to_host(&lane.cast(t, DType::F32).unwrap()).unwrap().to_vec::<f32>().unwrap();
    let (x, dy) = (cast(&[1.0, 2.0, -3.0, 4.0], [2, 2]), cast(&[1.0, 0.5, 2.0, 1.0], [2, 2]));
    // Token 0 goes to experts 1 and 0, token 1 to expert 1 alone: its second choice found no slot.
    let mut routing = routing(
        2,
        2,
        2,
        Assignment::TokenChoice {
            experts: Tensor::from_slice(&[1, 0, 1, 0], [2, 2]).unwrap(),
            slots: Tensor::from_slice(&[0, 0, 1, -1], [2, 2]).unwrap(),
            weights: Tensor::from_slice(&[0.5_f32, 0.25, 2.0, 9.0], [2, 2]).unwrap(),
        },
    );
    routing.loads = Tensor::from_slice(&[1, 2], [1, 2]).unwrap();
    for &kind in OrderKind::ALL {
        let order = kind.build();
        let (rows, saved) = order.dispatch(&lane, &routing, &x).unwrap();
        let y = order.combine(&lane, &routing, &saved, &rows.data).unwrap();
        assert_eq!((y.dtype(), floats(&y)), (DType::BF16, vec![0.75, 1.5, -6.0, 8.0]), "{kind}");
        let (d_rows, d_weights) = order.combine_backward(&lane, &routing, &saved, &rows.data, &dy).unwrap();
        assert_eq!((d_weights.dtype(), floats(&d_weights)), (DType::F32, vec![2.0, 2.0, -2.0, 0.0]), "{kind}");
        let dx = lane.empty_like(&x).unwrap();
        order.dispatch_backward(&lane, &routing, &saved, &x, &d_rows, &dx).unwrap();
        assert_eq!(floats(&dx), [0.75, 0.375, 4.0, 2.0], "{kind}");
    }
    // Two tokens, two slots: the mixing matrices stay in f32 as well.
    let matrix = |v: [f32; 4]| Tensor::from_slice(&v, [2, 2]).unwrap();
    routing.capacity = 1;
    routing.assignment =
        Assignment::Dense { dispatch: matrix([0.5, 1.0, 0.5, 0.0]), combine: matrix([1.0, 0.0, 0.5, 0.5]) };
    let (rows, saved) = GShard.dispatch(&lane, &routing, &x).unwrap();
    assert_eq!((rows.data.dtype(), floats(&rows.data)), (DType::BF16, vec![-1.0, 3.0, 1.0, 2.0]));
    let (_, d_combine) = GShard.combine_backward(&lane, &routing, &saved, &rows.data, &dy).unwrap();
    assert_eq!((d_combine.dtype(), floats(&d_combine)), (DType::F32, vec![0.5, 2.0, 1.0, 4.0]));
}
