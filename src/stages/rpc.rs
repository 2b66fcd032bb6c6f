//! The gRPC face of a plan's scheduler: requests become events with a way back. Nothing is decided
//! here.

use belfry_configs::plan::Plan;
use belfry_proto::v1::scheduler_server::Scheduler;
use belfry_proto::v1::{self, PlanStatus};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

/// The way back of a request.
pub type Answer<T> = oneshot::Sender<Result<T, String>>;

/// What comes in.
pub enum FromRpc {
    /// An agent says what runs there.
    Report(v1::AgentReport, Answer<v1::Assignment>),
    /// More stages are wanted.
    Submit(Plan, Answer<()>),
    /// A stage is not wanted any more.
    Cancel(String, Answer<()>),
    /// Somebody asks how the plan stands.
    Status(Answer<PlanStatus>),
}

/// The service.
pub struct Service {
    inbox: mpsc::Sender<FromRpc>,
}

impl Service {
    /// A service that tells `inbox` everything.
    pub fn new(inbox: mpsc::Sender<FromRpc>) -> Self {
        Service { inbox }
    }

    async fn ask<T>(&self, wish: impl FnOnce(Answer<T>) -> FromRpc) -> Result<Response<T>, Status> {
        let ending = || Status::unavailable("the scheduler ends");
        let (answer, answered) = oneshot::channel();
        let asked = self.inbox.send(wish(answer)).await;
        asked.map_err(|_| ending())?;
        match answered.await {
            Ok(Ok(answer)) => Ok(Response::new(answer)),
            Ok(Err(why)) => Err(Status::failed_precondition(why)),
            Err(_) => Err(ending()),
        }
    }
}

#[tonic::async_trait]
impl Scheduler for Service {
    async fn report(
        &self,
        request: Request<v1::AgentReport>,
    ) -> Result<Response<v1::Assignment>, Status> {
        let report = request.into_inner();
        self.ask(|answer| FromRpc::Report(report, answer)).await
    }

    async fn submit(
        &self,
        request: Request<v1::SubmitRequest>,
    ) -> Result<Response<v1::SubmitResponse>, Status> {
        let text = request.into_inner().plan;
        let plan = serde_json::from_str(&text).map_err(|e| {
            let why = format!("not a plan of this version: {e}");
            Status::invalid_argument(why)
        })?;
        self.ask(|answer| FromRpc::Submit(plan, answer)).await?;
        Ok(Response::new(v1::SubmitResponse {}))
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let stage = request.into_inner().stage;
        self.ask(|answer| FromRpc::Cancel(stage, answer)).await?;
        Ok(Response::new(v1::CancelResponse {}))
    }

    async fn plan(&self, _: Request<v1::PlanRequest>) -> Result<Response<PlanStatus>, Status> {
        self.ask(FromRpc::Status).await
    }
}
