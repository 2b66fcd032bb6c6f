//! AdamW on a device with a memory of its own: the same formula as `optimizer`, as tensor
//! operations on the flat vectors, so that the model never crosses to the host for a step.
//!
//! Rates and decays differ by parameter; they are laid out as two vectors for the update and freed
//! behind it. Price: for that moment two more vectors of the model's size, when no activations
//! live. It refuses to know the model.

use burn::tensor::{Device, Tensor};

use crate::optimizer::AdamW;

/// Parameters, first and second moments.
pub(crate) type Tensors = [Tensor<1>; 3];

/// Update number `step` (0-based) with the mean gradient of the step, all on one device and outside
/// autodiff.
pub(crate) fn apply(optimizer: &AdamW, step: u64, state: Tensors, gradient: Tensor<1>) -> Tensors {
    let [params, m, v] = state;
    let numbers = optimizer.numbers();
    let square = gradient.clone() * gradient.clone();
    let m = m * numbers.beta1 + gradient * numbers.one_minus_beta1;
    let v = v * numbers.beta2 + square * numbers.one_minus_beta2;
    let towards = m.clone() / (v.clone().sqrt() + numbers.epsilon);
    let (device, spans) = (params.device(), optimizer.spans(step));
    let params = params - towards * laid_out(&device, spans.iter().map(|(n, size, _)| (*n, *size)));
    let decays = laid_out(&device, spans.iter().map(|(n, _, decay)| (*n, *decay)));
    let decayed = params.clone() * decays;
    [params - decayed, m, v]
}

/// Numbers with how often each stands, as one vector.
fn laid_out(device: &Device, runs: impl Iterator<Item = (usize, f32)>) -> Tensor<1> {
    let parts = runs.map(|(len, number)| Tensor::full([len], number, device));
    Tensor::cat(parts.collect(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::{ParamGroup, State};
    use belfry_configs::rng::{Key, Purpose};
    use burn::tensor::TensorData;

    /// On the same arithmetic both ways give the same bits.
    #[test]
    fn device_and_host_update_alike() {
        let names = [
            "cross_modal_text_layers.0.attention.self.query.weight",
            "mlm_score.bias",
            "text_transformer.pooler.dense.weight",
            "vit_model.visual.ln_1.weight",
            "vit_model.visual.proj",
        ];
        let groups = names.iter().enumerate().map(|(i, name)| {
            let trained = !name.contains("pooler");
            ParamGroup::of(name, 7 * i, 7, trained)
        });
        let config = belfry_configs::load_str(
            include_str!("../../configs/tiny.toml"),
            "tiny.toml",
            &["optim.warmup=2".into(), "optim.weight_decay=0.1".into()],
        );
        let optim = config.expect("a run file of this repository").optim.clone();
        let optimizer = AdamW::new(optim, 12, 2, groups.collect());
        let len = 7 * names.len();
        let draw = |name: &str| -> Vec<f32> {
            let key = Key::new(1, Purpose::Init).with_name(name);
            (0..len).map(|i| key.normal(i as u64)).collect()
        };
        let mut host = [draw("p"), vec![0.0; len], vec![0.0; len]];
        let tensor = |values: &[f32]| {
            let data = TensorData::new(values.to_vec(), [len]);
            Tensor::<1>::from_data(data, &Device::flex())
        };
        let mut device = host.each_ref().map(|values| tensor(values));
        for step in 0..4 {
            let mut gradient = draw(&format!("g{step}"));
            gradient[14..21].fill(0.0);
            let [params, m, v] = &mut host;
            optimizer.apply(step, State { params, m, v }, &gradient);
            device = apply(&optimizer, step, device, tensor(&gradient));
        }
        for (host, device) in host.iter().zip(device) {
            assert_eq!(*host, device.try_into_vec_as::<f32>().expect("on the host"));
        }
    }
}
