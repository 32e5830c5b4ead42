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
    for kind in OrderKind::ALL {
        assert_eq!(kind.to_string().parse::<OrderKind>().unwrap(), kind);
        assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        assert_eq!(kind.build().name(), kind.name());
    }
    let message = "moe".parse::<OrderKind>().unwrap_err().to_string();
    assert_eq!(message, "order \"moe\": it is one of gshard, tutel, ragged");
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
    for kind in OrderKind::ALL {
        let x = Tensor::host_zeros([5, 3], DType::F32);
        let message = kind.build().dispatch(&Lane::cpu(), &routing, &x).err().unwrap().to_string();
        assert!(message.contains("(5, 3)") && message.contains("4 tokens"), "{message}");
    }
}
