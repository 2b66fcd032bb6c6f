//! A training step on kernels against the same step on the host: the same draws, and the same
//! gradient up to the order of sums.

use belfry_configs::rng::{Key, Purpose};
use belfry_model::{Device, Draws, ManagerTower, PretrainBatch, Weights};

mod tiny;
use tiny::{PAIRS, TEXT_LEN, images, keys, model, relative, texts};

/// Devices of this machine that are not the host.
fn devices() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut found = Vec::<Device>::new();
    #[cfg(feature = "cubecl-cpu")]
    found.push(Device::cpu());
    #[cfg(feature = "cuda")]
    found.extend(Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec());
    if found.is_empty() {
        println!("SKIPPED: no GPU, and built without the feature `cubecl-cpu`");
    }
    found
}

fn batch() -> PretrainBatch {
    let key = Key::new(1, Purpose::Pack);
    let micro_batches = 2;
    let (ids, text_mask) = texts(key, micro_batches * PAIRS);
    let chosen = |i: usize| i % 4 == 1;
    let label = |i: usize| if chosen(i) { ids[i] } else { -100 };
    PretrainBatch {
        micro_batches,
        pairs: PAIRS,
        text_len: TEXT_LEN,
        mlm_labels: (0..ids.len()).map(label).collect(),
        masked_ids: (0..ids.len())
            .map(|i| if chosen(i) { 39 } else { ids[i] })
            .collect(),
        ids,
        text_mask,
        images: images(key.with(1), micro_batches * PAIRS),
        itm_images: images(key.with(2), micro_batches * PAIRS),
        itm_labels: vec![1, 0, 0, 1],
    }
}

fn gradient(device: &Device, draws: Draws) -> (Vec<f32>, f64) {
    let tower = ManagerTower::new(&model(), TEXT_LEN).unwrap();
    let params = tower.table().init(3);
    let device = device.clone().autodiff();
    let weights = Weights::load(tower.table(), &params, &device).unwrap();
    let mut gradient = vec![0.0; tower.table().elements()];
    let reports = tower.pretrain_gradient(&weights, &batch(), draws, &mut gradient);
    let losses = reports
        .unwrap()
        .into_iter()
        .map(|r| r.mlm_loss + r.itm_loss);
    (gradient, losses.sum())
}

#[test]
fn a_step_with_draws_is_the_hosts_up_to_rounding() {
    let keys = keys(&[10, 11]);
    let (host, host_loss) = gradient(&Device::flex(), Draws::Keys(&keys));
    let (still, _) = gradient(&Device::flex(), Draws::Off);
    assert!(relative(&still, &host) > 1e-2, "draws change nothing");
    for device in devices() {
        let (ours, loss) = gradient(&device, Draws::Keys(&keys));
        let error = relative(&ours, &host);
        println!(
            "gradient differs from the host's by {error:.1e}, loss by {:.1e}",
            loss - host_loss
        );
        assert!(error < 1e-4, "gradients differ by {error}");
        assert!(
            (loss - host_loss).abs() < 1e-4,
            "{loss} against {host_loss}"
        );
        let (again, _) = gradient(&device, Draws::Keys(&keys));
        assert!(ours == again, "the same bits again");
    }
}
