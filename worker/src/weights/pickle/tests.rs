//! What the reader takes, what it refuses, and that nothing runs.

use proptest::prelude::*;

use super::*;

fn stopped(bytes: &[u8]) -> Stop {
    read(bytes).expect_err("must be refused")
}

#[test]
fn plain_data_is_read() {
    // {'a': (1, -2), 'b': [300]}
    let pickle =
        read(b"\x80\x02}(X\x01\0\0\0aK\x01J\xfe\xff\xff\xff\x86X\x01\0\0\0b](M\x2c\x01eu.")
            .expect("is a pickle");
    let Value::Dict(items) = pickle.root() else {
        panic!("a dict")
    };
    assert_eq!(items.len(), 2);
    assert_eq!(pickle.get(items[0].0), &Value::Text("a".into()));
    let Value::Tuple(pair) = pickle.get(items[0].1) else {
        panic!("a tuple")
    };
    assert_eq!(pickle.get(pair[1]), &Value::Int(-2));
}

#[test]
fn a_name_that_runs_commands_ends_the_reading() {
    let os_system = b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.";
    let Stop { offset, why } = stopped(os_system);
    assert_eq!((offset, why), (2, Why::Dangerous("os.system".into())));
    let by_stack = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.";
    assert_eq!(
        stopped(by_stack).why,
        Why::Dangerous("builtins.eval".into())
    );
    let submodule = b"\x80\x02cimportlib.util\nfind_spec\n.";
    assert!(matches!(stopped(submodule).why, Why::Dangerous(_)));
}

#[test]
fn an_unknown_class_is_inert_whatever_is_done_to_it() {
    // Made with arguments, built with state, filled with items.
    let pickle =
        read(b"\x80\x02cargparse\nNamespace\n)\x81}(X\x01\0\0\0aK\x01ubX\x01\0\0\0kK\x02s.")
            .expect("is walked over");
    let Value::Inert { class, state } = pickle.root() else {
        panic!("inert")
    };
    assert_eq!(class, "argparse.Namespace");
    assert!(state.is_some());
}

#[test]
fn a_view_outside_its_storage_is_refused() {
    let tensor = |offset: u8, size: u8, stride: u8| {
        let mut bytes = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ".to_vec();
        bytes.extend([
            b'K', offset, b'K', size, 0x85, b'K', stride, 0x85, 0x89, b'N', b't', b'R', b'.',
        ]);
        bytes
    };
    assert!(read(&tensor(0, 6, 1)).is_ok());
    assert!(read(&tensor(1, 3, 2)).is_ok());
    for lie in [tensor(1, 6, 1), tensor(0, 4, 2), tensor(6, 1, 1)] {
        let Why::Bad(reason) = stopped(&lie).why else {
            panic!("a lie, not an attack")
        };
        assert!(reason.contains("beyond its storage"), "{reason}");
    }
}

#[test]
fn damage_is_named() {
    for (bytes, word) in [
        (&b"\x80\x02X\xff\xff\xff\xffabc"[..], "early"),
        (b"\x80\x02.", "stack"),
        (b"\x80\x02t.", "stack"),
        (b"\x80\x02(K\x01(0.", "stack"),
        (b"\x80\x02h\x05.", "memo 5"),
        (b"\x80\x02}(K\x01u.", "key without"),
        (b"\x80\x02I1\n.", "0x49"),
        (b"\x80\x02K\x01)R.", "called"),
    ] {
        let Why::Bad(reason) = stopped(bytes).why else {
            panic!("damage, not an attack")
        };
        assert!(reason.contains(word), "`{word}` is not in `{reason}`");
    }
}

proptest! {
    #[test]
    fn any_bytes_end_in_a_value_or_a_named_stop(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        match read(&bytes) {
            Ok(pickle) => prop_assert!(pickle.values.len() <= bytes.len()),
            Err(stop) => prop_assert!(stop.offset <= bytes.len()),
        }
    }
}
