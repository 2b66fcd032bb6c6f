//! One contract for every store: memory, a folder, a real S3 server; and what a web server gives.

mod http_server;
#[path = "../../../tests/promises/s3_server.rs"]
mod s3_server;
#[path = "../../../tests/promises/skipped.rs"]
mod skipped;

use bytes::Bytes;
use futures::TryStreamExt as _;
use s3_server::{ACCESS_KEY, S3Server, SECRET_KEY};
use shard_tools::store::{Created, Environment, Root, StoreError};

/// More than one part of an upload in parts, and no multiple of one.
const LARGE_BYTES: usize = (33 << 20) + 5;

fn large() -> Bytes {
    (0..LARGE_BYTES)
        .map(|i| (i.wrapping_mul(31) >> 7) as u8)
        .collect()
}

async fn contract(root: &Root) {
    root.put("a/b.txt", Bytes::from_static(b"one"))
        .await
        .expect("puts");
    root.put("a/b.txt", Bytes::from_static(b"two"))
        .await
        .expect("replaces");
    assert_eq!(&root.get("a/b.txt").await.expect("is there")[..], b"two");
    let range = root.get_range("a/b.txt", 1..3).await;
    assert_eq!(&range.expect("is there")[..], b"wo");
    assert!(root.exists("a/b.txt").await.expect("answers"));
    assert!(!root.exists("a/c.txt").await.expect("answers"));
    for missing in [
        root.get("a/c.txt").await,
        root.get_range("a/c.txt", 0..1).await,
    ] {
        let missing = missing.expect_err("is not there");
        assert!(matches!(missing, StoreError::NotFound { .. }), "{missing}");
        assert!(
            missing.to_string().contains("a/c.txt does not exist"),
            "{missing}"
        );
        assert!(!missing.may_pass());
    }
    let racers = (0..16).map(|i| root.create("a/race", Bytes::from(format!("{i}"))));
    let outcomes = futures::future::try_join_all(racers)
        .await
        .expect("all answer");
    assert_eq!(outcomes.iter().filter(|o| **o == Created::Yes).count(), 1);
    // What a name may hold, and what a store's own escapes are made of.
    let odd = "a/~odd name%20+é#1.txt";
    root.put(odd, Bytes::from_static(b"odd"))
        .await
        .expect("puts");
    assert_eq!(&root.get(odd).await.expect("is there")[..], b"odd");

    let bytes = large();
    root.put_large("a/large", bytes.clone())
        .await
        .expect("puts");
    assert!(root.get("a/large").await.expect("is there") == bytes);
    let end = LARGE_BYTES as u64;
    let tail = root
        .get_range("a/large", end - 9..end)
        .await
        .expect("is there");
    assert_eq!(tail, bytes.slice(LARGE_BYTES - 9..));
    let pieces = root
        .stream_range("a/large", 9..end - 9)
        .await
        .expect("is there");
    let pieces: Vec<Bytes> = pieces.try_collect().await.expect("come");
    assert!(pieces.concat() == bytes[9..LARGE_BYTES - 9]);
    root.put_large("a/large", Bytes::from_static(b"small"))
        .await
        .expect("replaces");
    let keys = root.list("a").await.expect("lists");
    let sizes: Vec<(&str, u64)> = keys.iter().map(|(k, s)| (&**k, *s)).collect();
    assert_eq!(sizes.len(), 4, "{sizes:?}");
    assert_eq!(sizes[0], ("a/b.txt", 3));
    assert_eq!(sizes[1], ("a/large", 5));
    assert_eq!(sizes[3], (odd, 3));
    for (key, size) in &keys {
        let bytes = root.get(key).await.expect("what is listed is there");
        assert_eq!(bytes.len() as u64, *size);
    }
    for _ in 0..2 {
        root.delete("a/large")
            .await
            .expect("deletes, or finds nothing to delete");
        assert!(!root.exists("a/large").await.expect("answers"));
    }
    assert!(root.list("nothing").await.expect("lists").is_empty());
}

#[tokio::test]
async fn folders_and_memory_keep_the_contract() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().display().to_string();
    contract(&Root::open(&folder).expect("opens")).await;
    contract(&Root::open(&format!("file://{folder}/below")).expect("opens")).await;
    contract(&Root::open("memory://").expect("opens")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_s3_server_keeps_the_contract_and_names_what_is_wrong() {
    let Some(server) = S3Server::start() else {
        return;
    };
    let home = tempfile::tempdir().expect("a folder");
    let keys = |secret: &str| {
        format!("aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {secret}\n")
    };
    let process = format!(
        "credential_process = echo '{{\"Version\": 1, \"AccessKeyId\": \"{ACCESS_KEY}\", \
         \"SecretAccessKey\": \"{SECRET_KEY}\"}}'\n"
    );
    let config = format!(
        "[profile process]\nendpoint_url = {}\n{process}",
        server.endpoint()
    );
    let credentials = format!("[good]\n{}[bad]\n{}", keys(SECRET_KEY), keys("wrong"));
    std::fs::create_dir(home.path().join(".aws")).expect("is made");
    std::fs::write(home.path().join(".aws/config"), config).expect("is written");
    std::fs::write(home.path().join(".aws/credentials"), credentials).expect("is written");
    let endpoint = ("AWS_ENDPOINT_URL", server.endpoint());
    let environment = Environment::of(&[endpoint], Some(home.path()));
    let open = |path: &str| Root::open_in(&server.url(path), &environment).expect("opens");

    contract(&open("deep/er%20~x?profile=good")).await;
    let from_process = Environment::of(&[("AWS_PROFILE", "process")], Some(home.path()));
    let by_process = Root::open_in(&server.url("by-process"), &from_process).expect("opens");
    contract(&by_process).await;

    let anonymous = open("by-process?anonymous=true");
    assert_eq!(
        &anonymous.get("a/b.txt").await.expect("may be read")[..],
        b"two"
    );
    let refused = |said: Result<(), StoreError>| said.expect_err("is refused");
    let put = Bytes::from_static(b"x");
    let denied = [
        refused(anonymous.put("a/new", put.clone()).await),
        refused(anonymous.put_large("a/new", large()).await),
        refused(open("x?profile=bad").put("a/new", put.clone()).await),
    ];
    for denied in denied {
        assert!(matches!(denied, StoreError::Denied { .. }), "{denied}");
        let said = denied.to_string();
        assert!(
            said.contains("/a/new: access denied; check AWS_ACCESS_KEY_ID"),
            "{said}"
        );
        assert!(!said.contains(SECRET_KEY) && !said.contains('?'), "{said}");
    }
    let nowhere = Root::open_in("s3://no-such-bucket/p?profile=good", &environment);
    let missing = nowhere.expect("opens").get("x").await;
    let missing = missing.expect_err("is not there");
    assert!(
        missing.to_string().contains("or that the bucket exists"),
        "{missing}"
    );
}

#[tokio::test]
async fn a_web_server_is_read_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("data")).expect("is made");
    std::fs::write(folder.path().join("data/a.tar"), b"0123456789").expect("is written");
    let address = http_server::serve(folder.path());
    let environment = Environment::default();
    let root = Root::open_in(&format!("http://{address}/data/"), &environment).expect("opens");
    assert_eq!(
        &root.get("a.tar").await.expect("is there")[..],
        b"0123456789"
    );
    assert_eq!(
        &root.get_range("a.tar", 3..6).await.expect("is there")[..],
        b"345"
    );
    assert!(root.exists("a.tar").await.expect("answers"));
    assert!(!root.exists("b.tar").await.expect("answers"));
    let missing = root.get("b.tar").await.expect_err("is not there");
    assert!(matches!(missing, StoreError::NotFound { .. }), "{missing}");
    let put = Bytes::from_static(b"x");
    let refused = [
        root.put("c", put.clone()).await.err(),
        root.put_large("c", put.clone()).await.err(),
        root.create("c", put).await.err(),
        root.list("").await.err(),
    ];
    for refused in refused {
        let refused = refused.expect("is refused").to_string();
        assert!(
            refused.contains("http and https are read-only"),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_given_up_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let address = listener.local_addr().expect("is bound");
    drop(listener);
    let url = format!("s3://b/p?anonymous=true&endpoint=http://{address}&retry_timeout_s=1");
    let root = Root::open_in(&url, &Environment::default()).expect("opens");
    let begun = std::time::Instant::now();
    let gone = root.get("x").await.expect_err("is not there");
    assert!(gone.may_pass(), "{gone}");
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
}
