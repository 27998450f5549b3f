//! The requests of S3 that backup programs send, path style, answered from memory.

use std::io;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::http::{Answer, Request, receive, send};
use crate::objects::{Object, Objects};

const PAGE_KEYS_MAX: usize = 1000;

/// Answers the requests of one connection until it is closed.
pub async fn converse<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, objects: &Objects) -> io::Result<()> {
    let mut rest = Vec::new();
    while let Some(request) = receive(&mut stream, &mut rest).await? {
        let answer = answer(request, objects);
        send(&mut stream, &answer).await?;
    }
    Ok(())
}

fn answer(mut request: Request, objects: &Objects) -> Answer {
    let counts = &objects.counts;
    if request.path == "/-/counts" {
        let taken = |count: &std::sync::atomic::AtomicU64| count.swap(0, Ordering::Relaxed);
        let (requests, sent) = (taken(&counts.requests), taken(&counts.bytes_sent));
        let received = taken(&counts.bytes_received);
        let text =
            format!("{{\"requests\":{requests},\"bytes_sent\":{sent},\"bytes_received\":{received}}}\n");
        return Answer { status: "200 OK", body: text.into(), ..Answer::default() };
    }
    if let Some(prefix) = request.path.strip_prefix("/-/objects") {
        objects.delete_below(prefix);
        return Answer { status: "204 No Content", ..Answer::default() };
    }
    counts.requests.fetch_add(1, Ordering::Relaxed);
    counts.bytes_received.fetch_add(request.body.len() as u64, Ordering::Relaxed);
    let body = Bytes::from(std::mem::take(&mut request.body));
    let bucket_ends = request.path[1..].find('/').map_or(request.path.len(), |at| at + 1);
    let key = request.path.get(bucket_ends + 1..).unwrap_or("");
    let answer = match (request.method.as_str(), key.is_empty()) {
        ("GET", true) => list(&request, objects, &request.path[..bucket_ends]),
        ("POST", true) => delete_many(&request, objects, &body, &request.path[..bucket_ends]),
        ("PUT", false) => put(&request, objects, body),
        ("POST", false) => upload(&request, objects),
        ("GET", false) => get(&request, objects),
        ("HEAD", false) => {
            let whole = get(&request, objects);
            Answer { announced: Some(whole.body.len()), body: Bytes::new(), ..whole }
        }
        ("DELETE", false) => {
            objects.delete(&request.path);
            Answer { status: "204 No Content", ..Answer::default() }
        }
        _ => refusal("405 Method Not Allowed", "MethodNotAllowed"),
    };
    counts.bytes_sent.fetch_add(answer.body.len() as u64, Ordering::Relaxed);
    answer
}

fn put(request: &Request, objects: &Objects, body: Bytes) -> Answer {
    if let (Some(upload), Some(part)) = (request.query.get("uploadId"), request.query.get("partNumber")) {
        objects.put_part(upload, part.parse().unwrap_or(0), body);
    } else {
        let only_new = request.headers.get("if-none-match").is_some_and(|value| value == "*");
        if !objects.put(&request.path, body, only_new) {
            return refusal("412 Precondition Failed", "PreconditionFailed");
        }
    }
    Answer { status: "200 OK", headers: vec![("ETag", "\"0\"".to_owned())], ..Answer::default() }
}

fn upload(request: &Request, objects: &Objects) -> Answer {
    if request.query.contains_key("uploads") {
        let id = objects.start_upload();
        let text = format!(
            "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
        );
        return xml(text);
    }
    objects.finish_upload(&request.path, request.query.get("uploadId").map_or("", String::as_str));
    xml("<CompleteMultipartUploadResult><ETag>\"0\"</ETag></CompleteMultipartUploadResult>".to_owned())
}

fn get(request: &Request, objects: &Objects) -> Answer {
    let Some(Object { bytes, modified }) = objects.get(&request.path) else {
        return refusal("404 Not Found", "NoSuchKey");
    };
    let mut headers = vec![
        ("ETag", "\"0\"".to_owned()),
        ("Last-Modified", modified.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()),
    ];
    let Some(range) = request.headers.get("range").and_then(|range| range.strip_prefix("bytes=")) else {
        return Answer { status: "200 OK", headers, announced: None, body: bytes };
    };
    let (from, to) = range.split_once('-').unwrap_or((range, ""));
    let from = from.parse::<usize>().unwrap_or(0);
    let end = to.parse::<usize>().map_or(bytes.len(), |last| bytes.len().min(last + 1));
    if from >= end {
        return refusal("416 Range Not Satisfiable", "InvalidRange");
    }
    headers.push(("Content-Range", format!("bytes {from}-{}/{}", end - 1, bytes.len())));
    Answer { status: "206 Partial Content", headers, announced: None, body: bytes.slice(from..end) }
}

fn list(request: &Request, objects: &Objects, bucket: &str) -> Answer {
    let value = |name: &str| request.query.get(name).map_or("", String::as_str);
    let after = value("continuation-token").max(value("start-after"));
    let limit = value("max-keys").parse().unwrap_or(PAGE_KEYS_MAX).min(PAGE_KEYS_MAX);
    let page = objects.list(&format!("{bucket}/"), value("prefix"), value("delimiter"), after, limit);
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult><KeyCount>{}</KeyCount><IsTruncated>{}</IsTruncated>",
        page.objects.len() + page.folders.len(),
        page.next.is_some(),
    );
    if let Some(next) = page.next {
        text.push_str(&format!("<NextContinuationToken>{}</NextContinuationToken>", escaped(&next)));
    }
    for (key, object) in page.objects {
        text.push_str(&format!(
            "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>\"0\"</ETag><Size>{}</Size></Contents>",
            escaped(&key),
            object.modified.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            object.bytes.len(),
        ));
    }
    for folder in page.folders {
        text.push_str(&format!("<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>", escaped(&folder)));
    }
    xml(text + "</ListBucketResult>")
}

fn delete_many(request: &Request, objects: &Objects, body: &Bytes, bucket: &str) -> Answer {
    if !request.query.contains_key("delete") {
        return refusal("400 Bad Request", "InvalidRequest");
    }
    let text = String::from_utf8_lossy(body);
    for key in text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next()) {
        objects.delete(&format!("{bucket}/{}", unescaped(key)));
    }
    xml("<DeleteResult></DeleteResult>".to_owned())
}

fn xml(text: String) -> Answer {
    let headers = vec![("Content-Type", "application/xml".to_owned())];
    Answer { status: "200 OK", headers, announced: None, body: text.into() }
}

fn refusal(status: &'static str, code: &str) -> Answer {
    let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code></Error>");
    Answer { status, ..xml(text) }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn unescaped(text: &str) -> String {
    text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")
}
