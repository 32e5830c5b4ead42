use crate::device::cpu::Cpu;
use crate::device::cpu::util::random;
use crate::device::{GateKernels, OrderKernels, RowIndex, block_rows};
use crate::tensor::{DType, Element, Shape, Tensor};
use half::bf16;

fn tensor<T: Element>(data: &[T], shape: impl Into<Shape>) -> Tensor {
    Tensor::from_slice(data, shape).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}

fn ints(t: &Tensor) -> Vec<i32> {
    t.to_vec().unwrap()
}

#[test]
fn rows_are_gathered_and_scattered_by_index() {
    let src = tensor(&[1.0, 2.0, 3.0, 4.0], [2, 2]);
    let index = tensor(&[1, -1, 0, 1], [4]);
    let dst = Tensor::host([4, 2], DType::F64);
    Cpu.gather_rows(&src, &index, &dst).unwrap();
    assert_eq!(values(&dst), [3.0, 4.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
    Cpu.scatter_rows(&dst, &index, &src).unwrap();
    assert_eq!(values(&src), [2.0, 4.0, 9.0, 12.0]);
    for (bad, text) in [(2, "index[3] is 2, outside -1..2"), (-2, "index[3] is -2")] {
        let message = Cpu.gather_rows(&src, &tensor(&[0, 0, 0, bad], [4]), &dst).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn scattered_16_bit_rows_are_rounded_once_or_kept_in_f32() {
    let src = tensor(&[bf16::ONE, bf16::ONE], [2, 1]);
    let index = tensor(&[0, 0], [2]);
    let narrow = tensor(&[bf16::from_f32(256.0)], [1, 1]);
    Cpu.scatter_rows(&src, &index, &narrow).unwrap();
    assert_eq!(narrow.to_vec::<bf16>().unwrap()[0].to_f32(), 258.0);
    let wide = tensor(&[256.5_f32], [1, 1]);
    Cpu.scatter_rows(&src, &index, &wide).unwrap();
    assert_eq!(wide.to_vec::<f32>().unwrap(), [258.5]);
    assert!(Cpu.scatter_rows(&src, &index, &tensor(&[0.0], [1, 1])).is_err(), "bf16 is not accumulated in f64");
}

#[test]
fn a_row_index_starts_where_its_group_and_expert_do_and_inverts() {
    let experts = tensor(&[0, 1, 1, 0], [2, 2]);
    let slots = tensor(&[1, 0, 0, -1], [2, 2]);
    let starts = tensor(&[0, 4, 2, 6], [2, 2]); // two groups of one token
    let index = Tensor::host([2, 2], DType::I32);
    Cpu.row_index(&experts, &slots, &starts, &index).unwrap();
    assert_eq!(ints(&index), [1, 4, 6, -1]);
    let (choice, token) = (Tensor::host([8], DType::I32), Tensor::host([8], DType::I32));
    Cpu.invert_index(&index, &choice, &token).unwrap();
    assert_eq!(ints(&choice), [-1, 0, -1, -1, 1, -1, 2, -1]);
    assert_eq!(ints(&token), [-1, 0, -1, -1, 0, -1, 1, -1]);
    let message = Cpu.invert_index(&tensor(&[3, 1, 3, -1], [2, 2]), &choice, &token).unwrap_err().to_string();
    assert!(message.contains("row 3 twice, at 0 and 2"), "{message}");
    assert!(Cpu.row_index(&tensor(&[0, 2, 1, 0], [2, 2]), &slots, &starts, &index).is_err(), "there is no expert 2");
}

#[test]
fn rows_are_listed_by_token() {
    let (offsets, rows) = (Tensor::host([5], DType::I32), Tensor::host([5], DType::I32));
    Cpu.rows_by_token(&tensor(&[3, 0, 3, 1, 0], [5]), &offsets, &rows).unwrap();
    assert_eq!(ints(&offsets), [0, 2, 3, 3, 5]);
    assert_eq!(ints(&rows), [1, 4, 3, 0, 2]);
    let message = Cpu.rows_by_token(&tensor(&[3, 0, 3, -1, 0], [5]), &offsets, &rows).unwrap_err().to_string();
    assert!(message.contains("row_token[3] is -1, outside 0..4"), "{message}");
}

#[test]
fn combine_sums_listed_rows_with_weights() {
    let rows = tensor(&[1.0, 10.0, 2.0, 20.0, 3.0, 30.0], [3, 2]);
    let out = Tensor::host([2, 2], DType::F64);
    let index = tensor(&[2, 0, -1, 1], [4]);
    Cpu.combine_rows(&rows, &index, None, None, &out).unwrap();
    assert_eq!(values(&out), [4.0, 40.0, 2.0, 20.0]);
    let weights = tensor(&[0.5, 2.0, 9.0, -1.0], [4]);
    Cpu.combine_rows(&rows, &index, None, Some(&weights), &out).unwrap();
    assert_eq!(values(&out), [3.5, 35.0, -2.0, -20.0]);
    Cpu.combine_rows(&rows, &index, Some(&tensor(&[0, 0, 4], [3])), Some(&weights), &out).unwrap();
    assert_eq!(values(&out), [0.0, 0.0, 1.5, 15.0]);
    assert!(Cpu.combine_rows(&rows, &index, Some(&tensor(&[0, 3, 2], [3])), None, &out).is_err(), "offsets fall");
    assert!(Cpu.combine_rows(&rows, &tensor(&[0; 3], [3]), None, None, &out).is_err(), "3 indices for 2 tokens");
}

#[test]
fn combine_backward_is_its_derivative() {
    let (tokens, k, count, width) = (3, 2, 7, 4);
    let index = tensor(&[4, 0, -1, 6, 2, -1], [tokens, k]);
    let flat = index.reshape([tokens * k]).unwrap();
    let (choice, token) = (Tensor::host([count], DType::I32), Tensor::host([count], DType::I32));
    Cpu.invert_index(&index, &choice, &token).unwrap();
    let (rows, weights, dy) = (random(1, count * width), random(2, tokens * k), random(3, tokens * width));
    let loss = |rows: &[f64], weights: &[f64]| -> f64 {
        let out = Tensor::host([tokens, width], DType::F64);
        let (rows, weights) = (tensor(rows, [count, width]), tensor(weights, [tokens * k]));
        Cpu.combine_rows(&rows, &flat, None, Some(&weights), &out).unwrap();
        values(&out).iter().zip(&dy).map(|(y, d)| y * d).sum()
    };
    let d_rows = tensor(&[f64::NAN; 28], [count, width]);
    let d_weights = tensor(&[f64::NAN; 6], [tokens * k]);
    Cpu.combine_rows_backward(
        &tensor(&dy, [tokens, width]),
        &tensor(&rows, [count, width]),
        &token,
        &choice,
        &tensor(&weights, [tokens * k]),
        &d_rows,
        &d_weights,
    )
    .unwrap();
    // The loss is linear in each argument alone, so a difference of 1 is exact.
    let moved = |x: &[f64], i: usize| {
        let mut x = x.to_vec();
        x[i] += 1.0;
        x
    };
    let base = loss(&rows, &weights);
    for (i, d) in values(&d_rows).into_iter().enumerate() {
        assert!((d - (loss(&moved(&rows, i), &weights) - base)).abs() < 1e-14, "row element {i}: {d}");
    }
    for (i, d) in values(&d_weights).into_iter().enumerate() {
        assert!((d - (loss(&rows, &moved(&weights, i)) - base)).abs() < 1e-14, "weight {i}: {d}");
    }
}

#[test]
fn a_row_without_a_weight_is_refused() {
    let (one, m) = (tensor(&[0], [1]), tensor(&[1.0], [1, 1]));
    let (d_rows, d_weights) = (Tensor::host([1, 1], DType::F64), Tensor::host([1], DType::F64));
    let weights = tensor(&[1.0], [1]);
    let result = Cpu.combine_rows_backward(&m, &m, &one, &tensor(&[-1], [1]), &weights, &d_rows, &d_weights);
    assert!(result.unwrap_err().to_string().contains("row 0 of token 0 names no weight"));
}

/// Two groups of two tokens, two choices each of three experts; expert 2 of the first group drops nothing, expert 0 one.
struct Choices {
    experts: Tensor,
    slots: Tensor,
    loads: Tensor,
}

const CAPACITY: usize = 2;

fn choices() -> Choices {
    let experts = tensor(&[0, 2, 0, 1, 1, 0, 0, 1], [4, 2]);
    let loads = Tensor::host([2, 3], DType::I32);
    Cpu.count_experts(&experts, &loads).unwrap();
    assert_eq!(ints(&loads), [2, 1, 1, 2, 2, 0]);
    let slots = Tensor::host([4, 2], DType::I32);
    Cpu.assign_slots(&experts, None, 3, 2, CAPACITY, &slots).unwrap();
    assert_eq!(ints(&slots), [0, 0, 1, 0, 0, 1, 0, 1]);
    Choices { experts, slots, loads }
}

#[test]
fn padded_rows_lie_by_expert_then_group() {
    let Choices { experts, slots, loads } = choices();
    let (index, token, weight) =
        (Tensor::host([4, 2], DType::I32), Tensor::host([12], DType::I32), Tensor::host([12], DType::I32));
    let out = RowIndex { index: &index, row_token: &token, row_weight: &weight };
    Cpu.padded_index(&experts, &slots, &loads, CAPACITY, out).unwrap();
    assert_eq!(ints(&index), [0, 8, 1, 4, 6, 3, 2, 7]);
    assert_eq!(ints(&token), [0, 1, 3, 2, 1, -1, 2, 3, 0, -1, -1, -1]);
    assert_eq!(ints(&weight), [0, 2, 6, 5, 3, -1, 4, 7, 1, -1, -1, -1]);
}

#[test]
fn blocks_of_rows_are_aligned_and_what_is_past_the_limit_is_left_alone() {
    let Choices { experts, slots, loads } = choices();
    // Every expert's 4, 3 and 1 rows in blocks of 3: 6, 3 and 3.
    let rows = block_rows(8, 3, 3);
    assert_eq!(rows, 12);
    assert_eq!((block_rows(8, 3, 1), block_rows(1, 128, 128), block_rows(0, 4, 128)), (8, 128, 0));
    let count = rows + 2;
    let ints_of = |n: usize| Tensor::host([n], DType::I32);
    let (offsets, starts, index) = (ints_of(4), Tensor::host([2, 3], DType::I32), Tensor::host([4, 2], DType::I32));
    let (token, weight) = (ints_of(count), ints_of(count));
    let out = RowIndex { index: &index, row_token: &token, row_weight: &weight };
    Cpu.block_index(&experts, &slots, &loads, CAPACITY, 3, &offsets, &starts, out).unwrap();
    assert_eq!(ints(&offsets), [0, 6, 9, 12]);
    assert_eq!(ints(&starts), [0, 6, 9, 2, 7, 10]);
    assert_eq!(ints(&index), [0, 9, 1, 6, 7, 3, 2, 8]);
    assert_eq!(ints(&token), [0, 1, 3, 2, -1, -1, 1, 2, 3, 0, -1, -1, -1, -1]);
    assert_eq!(ints(&weight), [0, 2, 6, 5, -1, -1, 3, 4, 7, 1, -1, -1, -1, -1]);

    let limit = offsets.narrow(0, 3, 1).unwrap();
    let x = tensor(&[1.0, 2.0, 3.0, 4.0], [4, 1]);
    let data = tensor(&[9.0; 14], [14, 1]);
    Cpu.dispatch_rows(&x, &index, &token, Some(&limit), &data).unwrap();
    let dispatched = [1.0, 2.0, 4.0, 3.0, 0.0, 0.0, 2.0, 3.0, 4.0, 1.0, 0.0, 0.0, 9.0, 9.0];
    assert_eq!(values(&data), dispatched);
    Cpu.dispatch_rows(&x, &index, &token, None, &data).unwrap();
    assert_eq!(values(&data)[12..], [0.0, 0.0]);

    let weights = tensor(&[0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [8]);
    let (d_rows, d_weights) = (tensor(&[9.0; 14], [14, 1]), tensor(&[f64::NAN; 8], [8]));
    Cpu.combine_choices_backward(&x, &data, out, &weights, Some(&limit), &d_rows, &d_weights).unwrap();
    assert_eq!(values(&d_rows), [0.5, 4.0, 24.0, 15.0, 0.0, 0.0, 6.0, 12.0, 28.0, 1.0, 0.0, 0.0, 9.0, 9.0]);
    assert_eq!(values(&d_weights), [1.0, 1.0, 4.0, 4.0, 9.0, 9.0, 16.0, 16.0]);

    let by_row = tensor(&[f64::NAN; 14], [14]);
    Cpu.gather_scalars(&weights, &weight, &by_row).unwrap();
    assert_eq!(values(&by_row), [0.5, 2.0, 6.0, 5.0, 0.0, 0.0, 3.0, 4.0, 7.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    let message =
        Cpu.block_index(&experts, &slots, &loads, CAPACITY, 8, &offsets, &starts, out).unwrap_err().to_string();
    assert!(message.contains("14 rows for 8 choices of 3 experts, each expert's a multiple of 8"), "{message}");
}
