//! AdamW on a device with a memory of its own: the same formula as `optimizer`, as tensor
//! operations on the flat vectors, so that the model never crosses to the host for a step.
//!
//! A device with kernels takes the update as one of them. Elsewhere rates and decays, which differ
//! by parameter, are laid out as two vectors for the update and freed behind it. Price: for that
//! moment two more vectors of the model's size, when no activations live. It refuses to know the
//! model.

use burn::tensor::{Device, Tensor};

use crate::optimizer::{AdamW, Bounded};
#[cfg(feature = "cubecl")]
use crate::optimizer_kernel;

/// Parameters, first and second moments.
pub(crate) type Tensors = [Tensor<1>; 3];

/// Update number `step` (0-based) with the mean gradient of the step, all on one device and outside
/// autodiff.
pub(crate) fn apply(optimizer: &AdamW, step: u64, state: Tensors, gradient: Tensor<1>) -> Tensors {
    let [params, m, v] = update(optimizer, step, state, gradient);
    let Some(Bounded { offset, bounds }) = optimizer.bounded() else {
        return [params, m, v];
    };
    let place = offset..offset + 1;
    let value = params.clone().slice([place.clone()]);
    let value = value.clamp(bounds[0], bounds[1]);
    [params.slice_assign([place], value), m, v]
}

fn update(optimizer: &AdamW, step: u64, state: Tensors, gradient: Tensor<1>) -> Tensors {
    let numbers = optimizer.numbers();
    let spans = optimizer.spans(step);
    #[cfg(feature = "cubecl")]
    if let Some(updated) = optimizer_kernel::apply(numbers, &spans, &state, &gradient) {
        return updated;
    }
    let [params, m, v] = state;
    let square = gradient.clone() * gradient.clone();
    let m = m * numbers.beta1 + gradient * numbers.one_minus_beta1;
    let v = v * numbers.beta2 + square * numbers.one_minus_beta2;
    let towards = m.clone() / (v.clone().sqrt() + numbers.epsilon);
    let device = params.device();
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
    use crate::optimizer::{Bounded, ParamGroup, State};
    use belfry_configs::rng::{Key, Purpose};
    use burn::tensor::TensorData;

    /// Devices whose update must have the host's bits: the host's own operations, and kernels.
    fn devices() -> Vec<Device> {
        #[allow(unused_mut)]
        let mut found = vec![Device::flex()];
        #[cfg(feature = "cubecl-cpu")]
        found.push(Device::cpu());
        #[cfg(feature = "cuda")]
        found.extend(Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec());
        if found.len() == 1 {
            println!("SKIPPED the kernel: no GPU, and built without the feature `cubecl-cpu`");
        }
        found
    }

    #[test]
    fn devices_and_host_update_alike() {
        for device in devices() {
            for each in [1, 7, 5_003] {
                check(&device, each);
            }
        }
    }

    /// Several updates of parameters with `each` elements.
    fn check(device: &Device, each: usize) {
        let names = [
            "cross_modal_text_layers.0.attention.self.query.weight",
            "mlm_score.bias",
            "text_transformer.pooler.dense.weight",
            "vit_model.visual.ln_1.weight",
            "vit_model.visual.proj",
        ];
        let groups = names.iter().enumerate().map(|(i, name)| {
            let trained = !name.contains("pooler");
            ParamGroup::of(name, each * i, each, trained)
        });
        let config = belfry_configs::load_str(
            include_str!("../../configs/tiny.toml"),
            "tiny.toml",
            &["optim.warmup=2".into(), "optim.weight_decay=0.1".into()],
        );
        let optim = config.expect("a run file of this repository").optim.clone();
        let optimizer = AdamW::new(optim, 12, 2, groups.collect()).bounding(Some(Bounded {
            offset: each,
            bounds: [0.001, 0.002],
        }));
        let len = each * names.len();
        let draw = |name: &str| -> Vec<f32> {
            let key = Key::new(1, Purpose::Init).with_name(name);
            (0..len).map(|i| key.normal(i as u64)).collect()
        };
        let mut host = [draw("p"), vec![0.0; len], vec![0.0; len]];
        let tensor = |values: &[f32]| {
            let data = TensorData::new(values.to_vec(), [len]);
            Tensor::<1>::from_data(data, device)
        };
        let mut held = host.each_ref().map(|values| tensor(values));
        for step in 0..4 {
            let mut gradient = draw(&format!("g{step}"));
            gradient[2 * each..3 * each].fill(0.0);
            let [params, m, v] = &mut host;
            optimizer.apply(step, State { params, m, v }, &gradient);
            held = apply(&optimizer, step, held, tensor(&gradient));
        }
        assert!((0.001..=0.002).contains(&host[0][each]), "is brought back");
        for (host, held) in host.iter().zip(held) {
            assert_eq!(*host, held.try_into_vec_as::<f32>().expect("can be read"));
        }
    }
}
